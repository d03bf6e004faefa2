//! A real FTP server on 127.0.0.1 that serves one directory.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use libunftp::ServerBuilder;
use tokio::net::TcpListener;
use unftp_core::auth::{AuthenticationError, Authenticator, Credentials, Principal};
use unftp_sbe_fs::Filesystem;

/// Takes anonymous users, and `user` with `pass@word`.
#[derive(Debug)]
struct TestUsers;

#[async_trait::async_trait]
impl Authenticator for TestUsers {
    async fn authenticate(
        &self,
        username: &str,
        credentials: &Credentials,
    ) -> Result<Principal, AuthenticationError> {
        match (username, credentials.password.as_deref()) {
            ("anonymous", _) | ("user", Some("pass@word")) => Ok(Principal {
                username: username.to_owned(),
            }),
            _ => Err(AuthenticationError::BadPassword),
        }
    }
}

/// Serves `root`, uploads included, for as long as the runtime lives. Returns the control address.
pub async fn serve(root: &Path) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let root: PathBuf = root.to_path_buf();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let root = root.clone();
            let server =
                ServerBuilder::new(Box::new(move || Filesystem::new(root.clone()).unwrap()))
                    .authenticator(Arc::new(TestUsers))
                    .build()
                    .unwrap();
            tokio::spawn(server.service(stream));
        }
    });
    address
}
