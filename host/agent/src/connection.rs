//! The tasks that serve a connection.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use xbee_protocol::{HEARTBEAT_INTERVAL_MS, HostMessage, SILENCE_LIMIT_MS};

use crate::state::Shared;
use crate::{Error, Event, FrameReader, FrameWriter};

/// Reads what the agent sends until the connection ends.
pub(crate) async fn read<R: AsyncRead + Unpin>(mut reader: FrameReader<R>, shared: Arc<Shared>) {
    let silence = Duration::from_millis(SILENCE_LIMIT_MS);
    let reason = loop {
        let received = tokio::select! {
            received = timeout(silence, reader.next()) => received,
            () = shared.closing.cancelled() => return,
        };
        match received {
            Err(_elapsed) => {
                break Error::Silent {
                    seconds: silence.as_secs(),
                };
            }
            Ok(Err(error)) => break error,
            Ok(Ok(None)) => break Error::Closed,
            Ok(Ok(Some(message))) => {
                if let Err(error) = shared.receive(message) {
                    break error;
                }
            }
        }
    };
    shared.close(reason);
}

/// Writes what is queued, and heartbeats, until the connection ends.
pub(crate) async fn write<W: AsyncWrite + Unpin>(mut writer: FrameWriter<W>, shared: Arc<Shared>) {
    let mut heartbeat = interval(Duration::from_millis(HEARTBEAT_INTERVAL_MS));
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut frames = Vec::new();
    let reason = loop {
        tokio::select! {
            () = shared.outgoing_ready.notified() => {}
            _ = heartbeat.tick() => {
                if let Err(error) = shared.send(&HostMessage::Heartbeat) {
                    break error;
                }
            }
            () = shared.closing.cancelled() => return,
        }
        shared.lock().take_outgoing(&mut frames);
        if frames.is_empty() {
            continue;
        }
        let written = tokio::select! {
            written = writer.send_encoded(Some(&frames)) => written,
            () = shared.closing.cancelled() => return,
        };
        if let Err(error) = written {
            break error;
        }
    };
    shared.close(reason);
}

/// Hands events over at the pace at which they are taken; ends after [`Event::Lost`].
pub(crate) async fn deliver(shared: Arc<Shared>, events: mpsc::Sender<Event>) {
    loop {
        let next = {
            let mut state = shared.lock();
            match state.events.pop() {
                Some(event) => Some(event),
                None => state
                    .close_reason()
                    .map(|reason| Event::Lost(Error::Lost(reason))),
            }
        };
        match next {
            Some(event) => {
                let last = matches!(event, Event::Lost(_));
                if events.send(event).await.is_err() || last {
                    return;
                }
            }
            None => shared.events_ready.notified().await,
        }
    }
}
