//! A simulated guest's task: its outputs with their offsets, its end.

use std::time::Duration;

use tokio::time::Instant;
use xbee_protocol::{
    EndCause, ExitStatus, Exited, GuestMessage, MAX_DATA_BYTES, OUTPUT_WINDOW_BYTES, OutputStream,
    TaskEvent, Uuid,
};

use super::command::Run;

/// SIGTERM on Linux.
const TERM: i32 = 15;

/// Signals that do not end a process which does nothing about them: CHLD, CONT, URG, WINCH, those
/// that stop it, and none.
const HARMLESS_SIGNALS: [i32; 9] = [0, 17, 18, 19, 20, 21, 22, 23, 28];

#[derive(Debug)]
pub(super) struct Task {
    pub(super) conversation: Uuid,
    outputs: [Output; 2],
    started: Instant,
    ends_at: Instant,
    limit_at: Option<Instant>,
    status: ExitStatus,
    result: Option<TaskEvent>,
    result_sent: bool,
}

#[derive(Debug)]
struct Output {
    stream: OutputStream,
    content: Vec<u8>,
    acknowledged: usize,
    sent: usize,
}

impl Task {
    pub(super) fn new(
        conversation: Uuid,
        run: Run,
        wall_clock_ms: Option<u64>,
        now: Instant,
    ) -> Self {
        let output = |stream, content| Output {
            stream,
            content,
            acknowledged: 0,
            sent: 0,
        };
        Self {
            conversation,
            outputs: [
                output(OutputStream::Stdout, run.stdout),
                output(OutputStream::Stderr, run.stderr),
            ],
            started: now,
            ends_at: later(now, run.duration),
            limit_at: wall_clock_ms.map(|limit| later(now, Duration::from_millis(limit))),
            status: run.status,
            result: None,
            result_sent: false,
        }
    }

    /// A task that could not be started.
    pub(super) fn failed(
        conversation: Uuid,
        failure: xbee_protocol::Failure,
        now: Instant,
    ) -> Self {
        let nothing = Run {
            stdout: Vec::new(),
            stderr: Vec::new(),
            status: ExitStatus::Code(0),
            duration: Duration::ZERO,
            reads: false,
        };
        let mut task = Self::new(conversation, nothing, None, now);
        task.result = Some(TaskEvent::Failed(failure));
        task
    }

    pub(super) fn is_running(&self) -> bool {
        self.result.is_none()
    }

    pub(super) fn wake_at(&self) -> Option<Instant> {
        let at = self
            .limit_at
            .map_or(self.ends_at, |limit| limit.min(self.ends_at));
        self.is_running().then_some(at)
    }

    pub(super) fn tick(&mut self, now: Instant) {
        if !self.is_running() {
        } else if now >= self.ends_at {
            self.end(self.status, None, now);
        } else if self.limit_at.is_some_and(|limit| now >= limit) {
            self.end(killed(TERM), Some(EndCause::WallClockLimit), now);
        }
    }

    pub(super) fn terminate(&mut self, now: Instant) {
        if self.is_running() {
            self.end(killed(TERM), Some(EndCause::Terminated), now);
        }
    }

    /// False where it has ended already.
    pub(super) fn signal(&mut self, signal: i32, now: Instant) -> bool {
        let running = self.is_running();
        if running && !HARMLESS_SIGNALS.contains(&signal) {
            self.end(killed(signal), None, now);
        }
        running
    }

    fn end(&mut self, status: ExitStatus, cause: Option<EndCause>, now: Instant) {
        let [stdout, stderr] = &self.outputs;
        let elapsed = now.saturating_duration_since(self.started);
        self.result = Some(TaskEvent::Exited(Exited {
            status,
            cause,
            stdout_bytes: stdout.content.len() as u64,
            stderr_bytes: stderr.content.len() as u64,
            cpu_ms: 0,
            wall_clock_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            max_resident_kib: 0,
        }));
    }

    pub(super) fn acknowledge(&mut self, stream: OutputStream, offset: u64) {
        let output = self.output(stream);
        let offset = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(output.sent);
        output.acknowledged = output.acknowledged.max(offset);
    }

    /// Goes on, on a new connection, from where the host stopped; from what it has acknowledged where it
    /// does not say. False where that is not possible.
    pub(super) fn resume(&mut self, offsets: Option<[u64; 2]>) -> bool {
        self.result_sent = false;
        for (index, output) in self.outputs.iter_mut().enumerate() {
            let offset = match offsets {
                Some(offsets) => usize::try_from(offsets[index]).unwrap_or(usize::MAX),
                None => output.acknowledged,
            };
            if !(output.acknowledged..=output.content.len()).contains(&offset) {
                return false;
            }
            output.sent = offset;
        }
        true
    }

    /// The next message about it, if there is one and the host has room for it.
    pub(super) fn next(&mut self) -> Option<GuestMessage> {
        let conversation = self.conversation;
        for output in &mut self.outputs {
            let window = output
                .acknowledged
                .saturating_add(OUTPUT_WINDOW_BYTES as usize);
            let end = output
                .content
                .len()
                .min(window)
                .min(output.sent + MAX_DATA_BYTES);
            if end > output.sent {
                let event = TaskEvent::Output {
                    stream: output.stream,
                    offset: output.sent as u64,
                    data: output.content[output.sent..end].to_vec(),
                };
                output.sent = end;
                return Some(GuestMessage::Task {
                    conversation,
                    event,
                });
            }
        }
        let all_sent = self
            .outputs
            .iter()
            .all(|output| output.sent == output.content.len());
        if !all_sent || self.result_sent {
            return None;
        }
        let event = self.result.clone()?;
        self.result_sent = true;
        Some(GuestMessage::Task {
            conversation,
            event,
        })
    }

    fn output(&mut self, stream: OutputStream) -> &mut Output {
        match stream {
            OutputStream::Stdout => &mut self.outputs[0],
            OutputStream::Stderr => &mut self.outputs[1],
        }
    }
}

fn killed(signal: i32) -> ExitStatus {
    ExitStatus::Signal {
        signal,
        core_dumped: false,
    }
}

/// Now and a duration that may be absurd.
pub(super) fn later(now: Instant, duration: Duration) -> Instant {
    const YEAR: Duration = Duration::from_secs(86_400 * 365);
    now + duration.min(YEAR)
}
