//! An HTTP server of a few lines that behaves, or misbehaves, as its handler says.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::time::{Duration, sleep};
use tokio_rustls::TlsAcceptor;

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// Lower-case names.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

/// What to answer: raw pieces and pauses; then the connection closes.
pub enum Step {
    Send(Vec<u8>),
    Pause(Duration),
    /// Send the bytes again and again until the client goes away.
    Forever(Vec<u8>),
}

pub type Handler = Arc<dyn Fn(Request) -> Vec<Step> + Send + Sync>;

/// A complete answer.
pub fn answer(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Vec<Step> {
    let mut head = format!(
        "HTTP/1.1 {status} x\r\nContent-Length: {}\r\nConnection: close\r\n",
        body.len()
    );
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    vec![Step::Send([head.as_bytes(), body].concat())]
}

/// Serves until the runtime ends.
pub async fn serve(handler: impl Fn(Request) -> Vec<Step> + Send + Sync + 'static) -> SocketAddr {
    start(Arc::new(handler), None).await
}

/// Serves over TLS until the runtime ends.
pub async fn serve_tls(
    config: rustls::ServerConfig,
    handler: impl Fn(Request) -> Vec<Step> + Send + Sync + 'static,
) -> SocketAddr {
    start(Arc::new(handler), Some(TlsAcceptor::from(Arc::new(config)))).await
}

async fn start(handler: Handler, tls: Option<TlsAcceptor>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let handler = handler.clone();
            let tls = tls.clone();
            tokio::spawn(async move {
                // A client that goes away ends its connection; the client's side is what is tested.
                let _ = match tls {
                    None => converse(stream, handler).await,
                    Some(tls) => match tls.accept(stream).await {
                        Ok(stream) => converse(stream, handler).await,
                        Err(error) => Err(error),
                    },
                };
            });
        }
    });
    address
}

async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    handler: Handler,
) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).await?;
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let Some((first, rest)) = lines.split_first() else {
        return Ok(());
    };
    let mut words = first.split(' ').map(str::to_owned);
    let mut request = Request {
        method: words.next().unwrap_or_default(),
        path: words.next().unwrap_or_default(),
        headers: rest
            .iter()
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect(),
        body: Vec::new(),
    };
    if let Some(length) = request.header("content-length") {
        let mut body = vec![0; length.parse().unwrap()];
        stream.read_exact(&mut body).await?;
        request.body = body;
    }
    for step in handler(request) {
        match step {
            Step::Send(bytes) => stream.write_all(&bytes).await?,
            Step::Pause(time) => {
                stream.flush().await?;
                sleep(time).await;
            }
            Step::Forever(bytes) => loop {
                stream.write_all(&bytes).await?;
            },
        }
    }
    stream.flush().await?;
    stream.shutdown().await
}
