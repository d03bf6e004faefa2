//! News of tasks, bounded however slowly they are taken.

use std::collections::{HashMap, VecDeque};

use uuid::Uuid;
use xbee_protocol::{
    Exited, Failure, MAX_DATA_BYTES, OUTPUT_WINDOW_BYTES, OutputStream, ResumePoint, TaskEvent,
};

use crate::Error;
use crate::error::clean;

/// Adjacent output is merged up to this size, in bytes.
const MERGED_BYTES: usize = 256 * 1024;

/// How much of each task's output the host has durably, from earlier connections.
#[derive(Debug, Clone, Default)]
pub struct Resume {
    /// One for each task that the host has begun.
    pub points: Vec<ResumePoint>,
}

/// News from an agent.
#[derive(Debug)]
pub enum Event {
    /// The next bytes of a task's output: no gap, no repetition.
    Output {
        /// The task's conversation.
        conversation: Uuid,
        /// Which output.
        stream: OutputStream,
        /// Bytes before these.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// The task has ended and all of its output came before. Repeated on each connection.
    Exited {
        /// The task's conversation.
        conversation: Uuid,
        /// How.
        exited: Exited,
    },
    /// The task could not be started. Repeated on each connection.
    Failed {
        /// The task's conversation.
        conversation: Uuid,
        /// Why; the text is bounded and free of control characters.
        failure: Failure,
    },
    /// The connection is lost. The last event.
    Lost(Error),
}

/// What the host knows of a task on this connection.
#[derive(Debug, Default)]
struct Conversation {
    outputs: [Output; 2],
    ended: bool,
}

#[derive(Debug, Default)]
struct Output {
    /// Where the next bytes belong; unknown until the first come where only the agent knows.
    next: Option<u64>,
    acknowledged: u64,
}

/// Checks what the agent tells of tasks, and holds it until it is taken.
#[derive(Debug, Default)]
pub(crate) struct EventQueue {
    conversations: HashMap<Uuid, Conversation>,
    waiting: VecDeque<Event>,
}

impl EventQueue {
    /// Expects a task's output from the offsets at which the host stopped.
    pub(crate) fn resume(&mut self, point: &ResumePoint) {
        let at = |bytes| Output {
            next: Some(bytes),
            acknowledged: bytes,
        };
        let outputs = [at(point.stdout_bytes), at(point.stderr_bytes)];
        self.conversations.insert(
            point.conversation,
            Conversation {
                outputs,
                ended: false,
            },
        );
    }

    /// Expects news of a task that the agent says it has.
    pub(crate) fn known_to_agent(&mut self, conversation: Uuid) {
        self.conversations.entry(conversation).or_default();
    }

    /// Expects news of a task that is being started.
    pub(crate) fn executing(&mut self, conversation: Uuid) {
        self.conversations.entry(conversation).or_insert_with(|| {
            let start = || Output {
                next: Some(0),
                acknowledged: 0,
            };
            Conversation {
                outputs: [start(), start()],
                ended: false,
            }
        });
    }

    /// The host has everything before `offset`. False where that is not news to the agent.
    pub(crate) fn acknowledge(
        &mut self,
        conversation: Uuid,
        stream: OutputStream,
        offset: u64,
    ) -> bool {
        let Some(known) = self.conversations.get_mut(&conversation) else {
            return false;
        };
        let output = &mut known.outputs[stream as usize];
        if offset <= output.acknowledged || output.next.is_none_or(|next| offset > next) {
            return false;
        }
        output.acknowledged = offset;
        true
    }

    /// Takes up what the agent tells.
    pub(crate) fn push(&mut self, conversation: Uuid, event: TaskEvent) -> Result<(), Error> {
        let Some(known) = self.conversations.get_mut(&conversation) else {
            return Err(Error::protocol(format!(
                "news of an unknown task {conversation}"
            )));
        };
        if known.ended {
            return Err(Error::protocol(format!(
                "news of task {conversation} after its end"
            )));
        }
        match event {
            TaskEvent::Output {
                stream,
                offset,
                data,
            } => {
                let output = &mut known.outputs[stream as usize];
                let next = *output.next.get_or_insert_with(|| {
                    output.acknowledged = offset;
                    offset
                });
                if offset != next {
                    return Err(Error::protocol(format!(
                        "output of task {conversation} goes on at byte {offset}, not at {next}"
                    )));
                }
                let end = u64::try_from(data.len())
                    .ok()
                    .and_then(|length| next.checked_add(length));
                let Some(end) = end.filter(|_| !data.is_empty() && data.len() <= MAX_DATA_BYTES)
                else {
                    return Err(Error::protocol("output message of a wrong size"));
                };
                if end - output.acknowledged > OUTPUT_WINDOW_BYTES {
                    return Err(Error::protocol("more output than the window allows"));
                }
                output.next = Some(end);
                self.queue_output(conversation, stream, offset, data);
            }
            TaskEvent::Exited(exited) => {
                for (output, bytes) in known
                    .outputs
                    .iter()
                    .zip([exited.stdout_bytes, exited.stderr_bytes])
                {
                    if output.next.is_some_and(|next| next != bytes) {
                        return Err(Error::protocol(format!(
                            "task {conversation} has ended, but not all of its output came"
                        )));
                    }
                }
                known.ended = true;
                self.waiting.push_back(Event::Exited {
                    conversation,
                    exited,
                });
            }
            TaskEvent::Failed(failure) => {
                known.ended = true;
                self.waiting.push_back(Event::Failed {
                    conversation,
                    failure: clean(failure),
                });
            }
        }
        Ok(())
    }

    /// Output goes to the last piece of the same output that still waits, so that many small
    /// messages take no more room than their bytes.
    fn queue_output(
        &mut self,
        conversation: Uuid,
        stream: OutputStream,
        offset: u64,
        data: Vec<u8>,
    ) {
        let last = self.waiting.iter_mut().rev().find_map(|event| match event {
            Event::Output {
                conversation: c,
                stream: s,
                data,
                ..
            } if *c == conversation && *s == stream => Some(data),
            _ => None,
        });
        match last {
            Some(piece) if piece.len() + data.len() <= MERGED_BYTES => {
                piece.extend_from_slice(&data)
            }
            _ => self.waiting.push_back(Event::Output {
                conversation,
                stream,
                offset,
                data,
            }),
        }
    }

    pub(crate) fn pop(&mut self) -> Option<Event> {
        self.waiting.pop_front()
    }
}
