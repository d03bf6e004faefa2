//! SSH into a domain: a key pair for the user and a host key, both made for this domain alone.

use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use ssh_key::rand_core::OsRng;
use ssh_key::{Algorithm, LineEnding, PrivateKey};
use xbee_api::SshAccess;

use crate::task::TaskHandle;

/// Port of the SSH server in a domain.
const PORT: u16 = 22;
const USER_KEY: &str = "ssh_user_key";
const HOST_KEY: &str = "ssh_host_key";
const USER: &str = "ssh_user";
/// Files that are not complete yet.
pub const DRAFTS: [&str; 3] = ["ssh_user_key.new", "ssh_host_key.new", "ssh_user.new"];

/// Why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum SshError {
    /// No key.
    #[error("cannot make an SSH key")]
    Key(#[from] ssh_key::Error),
    /// No file.
    #[error("cannot keep the SSH keys in the task's spool")]
    Io(#[from] io::Error),
}

/// What goes into the domain.
#[derive(Debug)]
pub struct GuestKeys {
    /// Line of `authorized_keys`.
    pub authorized_key: String,
    /// Private host key, OpenSSH form.
    pub host_key: String,
    /// Public host key, one line.
    pub host_key_public: String,
}

/// Makes the keys of a task, or reads those made before.
pub fn prepare(spool: &Path, user: &str, name: &str) -> Result<GuestKeys, SshError> {
    let host = key(&spool.join(HOST_KEY), name)?;
    let own = key(&spool.join(USER_KEY), name)?;
    // Last: `access` takes this file as the sign that all is there.
    write_private(&spool.join(USER), user)?;
    Ok(GuestKeys {
        authorized_key: own.public_key().to_openssh()? + "\n",
        host_key: host.to_openssh(LineEnding::LF)?.to_string(),
        host_key_public: host.public_key().to_openssh()? + "\n",
    })
}

fn key(path: &Path, comment: &str) -> Result<PrivateKey, SshError> {
    // One that a power cut has damaged is in no domain: that one ended with it.
    if let Ok(key) = PrivateKey::read_openssh_file(path) {
        return Ok(key);
    }
    let mut key = PrivateKey::random(&mut OsRng, Algorithm::Ed25519)?;
    key.set_comment(comment);
    write_private(path, &key.to_openssh(LineEnding::LF)?)?;
    Ok(key)
}

/// A file for this user alone, whole or not at all.
fn write_private(path: &Path, content: &str) -> io::Result<()> {
    use std::io::Write;
    let draft = path.with_extension("new");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)?;
    file.write_all(content.as_bytes())?;
    std::fs::rename(&draft, path)
}

/// How a user reaches a task's domain; nothing before the domain has its keys.
pub fn access(task: &TaskHandle) -> Option<SshAccess> {
    let user = std::fs::read_to_string(task.spool.join(USER)).ok()?;
    let private_key = std::fs::read_to_string(task.spool.join(USER_KEY)).ok()?;
    let host_key = PrivateKey::read_openssh_file(&task.spool.join(HOST_KEY))
        .and_then(|key| key.public_key().to_openssh())
        .ok()?;
    Some(SshAccess {
        user,
        port: PORT,
        private_key,
        host_key,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn keys_are_made_once_for_this_user_alone() {
        let spool = tempfile::tempdir().unwrap();
        let first = prepare(spool.path(), "root", "xbee-1").unwrap();
        let again = prepare(spool.path(), "root", "xbee-1").unwrap();
        assert_eq!(first.authorized_key, again.authorized_key);
        assert_eq!(first.host_key_public, again.host_key_public);
        assert_ne!(first.authorized_key, first.host_key_public);
        assert!(first.authorized_key.starts_with("ssh-ed25519 "));
        for name in [USER_KEY, HOST_KEY] {
            let meta = std::fs::metadata(spool.path().join(name)).unwrap();
            assert_eq!(meta.permissions().mode() & 0o777, 0o600);
        }
    }
}
