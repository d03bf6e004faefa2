//! Serves a directory by FTP on 127.0.0.1, uploads included, for tests that need a real server.
//!
//! `ftp-server DIR` prints `ftp://127.0.0.1:PORT` on its first line and runs until it is killed.
//! Anonymous access, or user `user` with password `pass@word`.

#![allow(
    clippy::unwrap_used,
    reason = "a test server stops at what it does not expect"
)]

#[path = "../tests/common/ftp.rs"]
mod ftp;

#[tokio::main]
async fn main() {
    let Some(root) = std::env::args_os().nth(1) else {
        eprintln!("usage: ftp-server DIR");
        std::process::exit(2);
    };
    let address = ftp::serve(root.as_ref()).await;
    println!("ftp://{address}");
    std::future::pending::<()>().await;
}
