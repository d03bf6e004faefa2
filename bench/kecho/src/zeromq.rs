//! ZeroMQ: PUB and SUB, over TCP and over a unix socket.

use std::time::Duration;

use zmq::{Context, Message, Socket, SocketType};

use crate::system::{Place, Publisher, Result, Subscriber, System, crate_version};

/// Events that a publisher is ahead of the slowest subscriber: PUB drops what a full queue does not take, so the queues
/// are unlimited and the publisher is not.
const WINDOW: u64 = 16 * 1024;

pub enum ZeroMq {
    Tcp,
    Ipc,
}

impl ZeroMq {
    fn endpoint(&self, place: &Place) -> String {
        match self {
            ZeroMq::Tcp => format!("tcp://127.0.0.1:{}", place.port),
            ZeroMq::Ipc => format!("ipc://{}", place.file("zmq").display()),
        }
    }
}

impl System for ZeroMq {
    fn name(&self) -> &'static str {
        match self {
            ZeroMq::Tcp => "ZeroMQ, tcp",
            ZeroMq::Ipc => "ZeroMQ, ipc",
        }
    }

    fn version(&self) -> Result<String> {
        let (major, minor, patch) = zmq::version();
        let client = crate_version("zmq")?;
        Ok(format!("{major}.{minor}.{patch}, zmq {client}"))
    }

    fn publisher(&self, place: &Place, _subscribers: usize) -> Result<Box<dyn Publisher>> {
        let socket = Context::new().socket(SocketType::PUB)?;
        socket.set_sndhwm(0)?;
        socket.set_linger(0)?;
        socket.bind(&self.endpoint(place))?;
        Ok(Box::new(Sending(socket)))
    }

    fn subscriber(&self, place: &Place) -> Result<Box<dyn Subscriber>> {
        let socket = Context::new().socket(SocketType::SUB)?;
        socket.set_rcvhwm(0)?;
        socket.set_linger(0)?;
        socket.set_subscribe(b"")?;
        socket.connect(&self.endpoint(place))?;
        Ok(Box::new(Receiving {
            socket,
            patience: None,
            message: Message::new(),
        }))
    }

    fn window(&self) -> Option<u64> {
        Some(WINDOW)
    }
}

struct Sending(Socket);

impl Publisher for Sending {
    fn send(&mut self, event: &[u8]) -> Result<()> {
        Ok(self.0.send(event, 0)?)
    }
}

struct Receiving {
    socket: Socket,
    patience: Option<Duration>,
    message: Message,
}

impl Subscriber for Receiving {
    fn receive(
        &mut self,
        patience: Option<Duration>,
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<usize> {
        if patience != self.patience {
            let millis = patience.map_or(Ok(-1), |patience| i32::try_from(patience.as_millis()))?;
            self.socket.set_rcvtimeo(millis)?;
            self.patience = patience;
        }
        match self.socket.recv(&mut self.message, 0) {
            Ok(()) => {
                take(&self.message)?;
                Ok(1)
            }
            Err(zmq::Error::EAGAIN) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }
}
