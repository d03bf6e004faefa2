//! A broker in this process, and clients that write and read bytes.
#![allow(clippy::unwrap_used, dead_code, reason = "each suite uses some of it")]

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use xbee_mq::config::Config;
use xbee_mq::decode::{Decoder, FrameLimits};
use xbee_mq::frame::{Command, Frame, Version};
use xbee_mq::limits::Limits;
use xbee_mq::server::{Server, ServerError};

/// A test that waits longer has failed.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A broker that ends with this value.
pub struct Broker {
    pub address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Broker {
    /// In memory, for anybody.
    pub fn start() -> Broker {
        Broker::with(|_| {})
    }

    /// With other limits.
    pub fn limited(change: impl FnOnce(&mut Limits)) -> Broker {
        Broker::with(|config| change(&mut config.limits))
    }

    /// With another configuration.
    pub fn with(change: impl FnOnce(&mut Config)) -> Broker {
        let mut config = Config::new("127.0.0.1:0".parse().unwrap());
        change(&mut config);
        let (stop, stopped) = oneshot::channel();
        let (opened, address) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let server = Server::open(config)?;
            opened.send(server.address()).unwrap();
            server.run(async {
                let _ = stopped.await;
            })
        });
        Broker {
            address: address.recv().expect("a broker that listens"),
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// A client that has not said anything.
    pub fn dial(&self) -> Client {
        Client::dial(self.address)
    }

    /// A client that is connected.
    pub fn connect(&self, version: Version) -> Client {
        let mut client = self.dial();
        client.connect(version);
        client
    }

    /// A client of 1.2.
    pub fn client(&self) -> Client {
        self.connect(Version::V1_2)
    }

    /// Ends it, and waits until it has.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            if !std::thread::panicking() {
                result.unwrap().unwrap();
            }
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.end();
    }
}

/// A socket.
pub struct Client {
    pub stream: TcpStream,
    decoder: Decoder,
    input: Vec<u8>,
    /// Messages that came while a receipt was waited for.
    aside: VecDeque<Frame>,
}

impl Client {
    pub fn dial(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client {
            stream,
            decoder: Decoder::new(Version::V1_2, FrameLimits::default()),
            input: Vec::new(),
            aside: VecDeque::new(),
        }
    }

    pub fn connect(&mut self, version: Version) -> Frame {
        match version {
            Version::V1_0 => self.send("CONNECT\n\n\0"),
            version => self.send(format!("CONNECT\naccept-version:{version}\nhost:x\n\n\0")),
        }
        self.decoder.set_version(version);
        let connected = self.expect(Command::Connected);
        assert_eq!(connected.headers.get("version"), Some(version.as_str()));
        connected
    }

    /// Writes these bytes.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// Writes, and waits for the receipt `r`, which the frame asks for. Messages that come before it are kept.
    pub fn send_with_receipt(&mut self, bytes: impl AsRef<[u8]>) {
        self.send(bytes);
        loop {
            let frame = self.next().expect("a receipt");
            if frame.command == Command::Message {
                self.aside.push_back(frame);
                continue;
            }
            assert_eq!(
                frame.command,
                Command::Receipt,
                "{frame:?} {}",
                text(&frame)
            );
            assert_eq!(frame.headers.get("receipt-id"), Some("r"));
            return;
        }
    }

    /// The next frame; `None` at the end of the connection.
    pub fn read(&mut self) -> Option<Frame> {
        self.aside.pop_front().or_else(|| self.next())
    }

    fn next(&mut self) -> Option<Frame> {
        loop {
            let mut input = &self.input[..];
            let frame = self.decoder.decode(&mut input).unwrap();
            self.input = input.to_vec();
            if frame.is_some() {
                return frame;
            }
            if self.fill() == 0 {
                return None;
            }
        }
    }

    fn fill(&mut self) -> usize {
        let mut buffer = [0; 65536];
        match self.stream.read(&mut buffer) {
            Ok(count) => {
                self.input.extend_from_slice(&buffer[..count]);
                count
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => 0,
            Err(error) => panic!("nothing came: {error}"),
        }
    }

    /// The next frame, which is one of these.
    pub fn expect(&mut self, command: Command) -> Frame {
        let frame = self.read().expect("a frame");
        assert_eq!(frame.command, command, "{frame:?} {}", text(&frame));
        frame
    }

    /// The next frame, a message with this body.
    pub fn expect_message(&mut self, body: &str) -> Frame {
        let frame = self.expect(Command::Message);
        assert_eq!(text(&frame), body);
        frame
    }

    /// An error with this code, and then the end.
    pub fn expect_error(&mut self, code: &str) -> Frame {
        let frame = self.expect(Command::Error);
        assert_eq!(frame.headers.get("code"), Some(code), "{}", text(&frame));
        assert!(frame.headers.get("message").is_some_and(|m| !m.is_empty()));
        assert!(!frame.body.is_empty());
        assert_eq!(self.read(), None, "the connection goes on after ERROR");
        frame
    }

    /// Nothing comes for a while, though the broker has read all that was sent.
    pub fn expect_nothing(&mut self) {
        self.send("BEGIN\ntransaction:nothing\nreceipt:nothing\n\n\0");
        self.send("ABORT\ntransaction:nothing\n\n\0");
        let frame = self.expect(Command::Receipt);
        assert_eq!(frame.headers.get("receipt-id"), Some("nothing"));
    }

    pub fn subscribe(&mut self, id: &str, destination: &str, ack: &str) {
        self.send_with_receipt(format!(
            "SUBSCRIBE\nid:{id}\ndestination:{destination}\nack:{ack}\nreceipt:r\n\n\0"
        ));
    }

    /// Sends a message and waits for its receipt.
    pub fn publish(&mut self, destination: &str, body: &str) {
        self.send_with_receipt(format!(
            "SEND\ndestination:{destination}\nreceipt:r\n\n{body}\0"
        ));
    }

    /// ACK or NACK in 1.2.
    pub fn answer(&mut self, command: &str, message: &Frame) {
        let id = message.headers.get("ack").unwrap();
        self.send_with_receipt(format!("{command}\nid:{id}\nreceipt:r\n\n\0"));
    }

    /// The bytes that come until the time is over.
    pub fn listen(&mut self, time: Duration) -> Vec<u8> {
        let end = Instant::now() + time;
        let mut heard = std::mem::take(&mut self.input);
        let mut buffer = [0; 4096];
        while let Some(left) = end
            .checked_duration_since(Instant::now())
            .filter(|l| !l.is_zero())
        {
            self.stream.set_read_timeout(Some(left)).unwrap();
            match self.stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => heard.extend_from_slice(&buffer[..count]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => panic!("{error}"),
            }
        }
        self.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        heard
    }
}

/// The body.
pub fn text(frame: &Frame) -> String {
    String::from_utf8_lossy(&frame.body).into_owned()
}
