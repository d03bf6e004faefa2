//! The broker's configuration: a TOML file, every key of which may be left out.
//!
//! ```toml
//! [limits]
//! body-bytes = 1048576
//!
//! [tls]
//! certificate = "/etc/xbee/broker.pem"
//! key = "/etc/xbee/broker.key"
//!
//! [users.alice]
//! password-file = "/etc/xbee/alice" # holds a hash; or password = "pbkdf2-sha256$…"
//! read = ["/queue/results.*"]
//! write = ["/queue/jobs", "/topic/*"]
//! ```

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use crate::access::{PasswordHash, PasswordHashError, User, Users};
use crate::destination::{Pattern, Rights};
use crate::limits::Limits;

/// Where clients are listened to unless something else is said.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:61613";

/// What a broker is to do.
#[derive(Debug, Clone)]
pub struct Config {
    /// Address and port to listen on; port 0 is any.
    pub listen: SocketAddr,
    /// Directory of persistent messages; without it all messages are in memory only.
    pub data: Option<PathBuf>,
    /// Limits.
    pub limits: Limits,
    /// Who may connect.
    pub users: Users,
    /// Certificate chain and key, PEM; with them all connections are TLS.
    pub tls: Option<TlsFiles>,
}

/// The broker's certificate.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct TlsFiles {
    /// The certificate and those up to its authority, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    #[serde(default)]
    limits: Limits,
    tls: Option<TlsFiles>,
    #[serde(default)]
    users: HashMap<String, UserFile>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct UserFile {
    password: Option<String>,
    password_file: Option<PathBuf>,
    #[serde(default)]
    read: Vec<Pattern>,
    #[serde(default)]
    write: Vec<Pattern>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file makes no sense.
    #[error("the broker's configuration file {path} is not as expected")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A user has no password, or two.
    #[error("the user {user:?} needs one of password and password-file")]
    NoPassword {
        /// Who.
        user: String,
    },
    /// A user's password is no hash.
    #[error("the password of the user {user:?} is no hash")]
    Password {
        /// Who.
        user: String,
        /// Why.
        #[source]
        source: PasswordHashError,
    },
    /// A user could do nothing.
    #[error(
        "the user {user:?} may neither read nor write: give it destinations, as read = [\"/queue/*\"]"
    )]
    NoRights {
        /// Who.
        user: String,
    },
    /// Open to the network.
    #[error(
        "no users are configured, so anybody may do everything, and {listen} can be reached from other machines: \
         configure users, or listen on 127.0.0.1"
    )]
    Open {
        /// The address.
        listen: SocketAddr,
    },
}

impl ConfigError {
    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            ConfigError::Open { .. } => "broker-open",
            _ => "broker-config",
        }
    }
}

impl Config {
    /// A broker on this address, without a disk, for anybody.
    pub fn new(listen: SocketAddr) -> Config {
        Config {
            listen,
            data: None,
            limits: Limits::default(),
            users: Users::default(),
            tls: None,
        }
    }

    /// The same, with what the file says.
    pub fn read(mut self, path: &Path) -> Result<Config, ConfigError> {
        let file: File = toml::from_str(&read(path)?).map_err(|source| ConfigError::Parse {
            path: path.into(),
            source: Box::new(source),
        })?;
        self.limits = file.limits;
        self.tls = file.tls;
        let mut users = HashMap::new();
        for (name, user) in file.users {
            users.insert(name.clone(), user_of(name, user)?);
        }
        self.users = Users::new(users);
        Ok(self)
    }

    /// Whether it may run: not open to other machines.
    pub fn check(&self) -> Result<(), ConfigError> {
        match self.users.is_open() && !self.listen.ip().is_loopback() {
            true => Err(ConfigError::Open {
                listen: self.listen,
            }),
            false => Ok(()),
        }
    }
}

fn user_of(name: String, user: UserFile) -> Result<User, ConfigError> {
    let text = match (user.password, user.password_file) {
        (Some(text), None) => text,
        (None, Some(path)) => read(&path)?,
        _ => return Err(ConfigError::NoPassword { user: name }),
    };
    if user.read.is_empty() && user.write.is_empty() {
        return Err(ConfigError::NoRights { user: name });
    }
    match text.parse::<PasswordHash>() {
        Ok(password) => Ok(User {
            password,
            rights: Arc::new(Rights {
                read: user.read,
                write: user.write,
            }),
        }),
        Err(source) => Err(ConfigError::Password { user: name, source }),
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.into(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("broker.toml");
        std::fs::write(&path, text).unwrap();
        Config::new("127.0.0.1:0".parse().unwrap()).read(&path)
    }

    fn cause(error: ConfigError) -> String {
        match std::error::Error::source(&error) {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        }
    }

    #[test]
    fn limits_and_users_come_from_the_file() {
        let hash = "pbkdf2-sha256$1$0011223344556677$".to_owned() + &"00".repeat(32);
        let text = format!(
            "[limits]\nbody-bytes = 5\n[users.a]\npassword = \"{hash}\"\nread = [\"/queue/x*\"]\n"
        );
        let config = load(&text).unwrap();
        assert_eq!(config.limits.body_bytes, 5);
        assert_eq!(config.limits.prefetch, Limits::default().prefetch);
        assert!(!config.users.is_open());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let unknown = cause(load("[limits]\nbody = 5\n").unwrap_err());
        assert!(
            unknown.contains("body") && unknown.contains("line 2"),
            "{unknown}"
        );
        let password = cause(load("[users.a]\npassword = \"a\"\nread = [\"*\"]\n").unwrap_err());
        assert!(
            password.contains("\"a\"") && password.contains("hash"),
            "{password}"
        );
        let none = cause(load("[users.a]\nread = [\"*\"]\n").unwrap_err());
        assert!(none.contains("password-file"), "{none}");
        let pattern = cause(load("[users.a]\npassword=\"a\"\nread = [\"*a\"]\n").unwrap_err());
        assert!(pattern.contains('*'), "{pattern}");
    }

    #[test]
    fn without_users_it_is_for_this_machine_only() {
        let check = |listen: &str| Config::new(listen.parse().unwrap()).check().map_err(cause);
        assert_eq!(check("127.0.0.1:61613"), Ok(()));
        assert_eq!(check("[::1]:61613"), Ok(()));
        assert!(check("0.0.0.0:61613").unwrap_err().contains("users"));
        assert!(check("[::]:61613").is_err());
    }
}
