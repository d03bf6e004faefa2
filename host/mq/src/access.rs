//! Who may connect, and what they may do.
//!
//! Passwords are kept as PBKDF2 with HMAC-SHA-256 (RFC 8018): `pbkdf2-sha256$ITERATIONS$SALT$HASH`, the last two in
//! hexadecimal. `xbed broker --hash-password` makes one.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use ring::pbkdf2;
use ring::rand::{SecureRandom, SystemRandom};

use crate::destination::Rights;

/// Iterations of a new hash (OWASP's advice of 2023 for this function).
const ITERATIONS: u32 = 600_000;
/// A hash with more would keep a processor busy for minutes.
const ITERATIONS_MAX: u32 = 10_000_000;
const SALT_BYTES: usize = 16;
const HASH_BYTES: usize = 32;

/// A password that cannot be read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PasswordHash {
    iterations: NonZeroU32,
    salt: Vec<u8>,
    hash: Vec<u8>,
}

/// Why a text is no hash of a password, or none can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PasswordHashError {
    /// Another form.
    #[error(
        "not of the form pbkdf2-sha256$ITERATIONS$SALT$HASH, as `xbed broker --hash-password` prints it"
    )]
    Form,
    /// The system's source of chance.
    #[error("the system gives no random numbers")]
    Random,
}

impl PasswordHash {
    /// Hashes a password with a new salt.
    pub fn new(password: &str) -> Result<PasswordHash, PasswordHashError> {
        let iterations = NonZeroU32::new(ITERATIONS).ok_or(PasswordHashError::Form)?;
        PasswordHash::with_iterations(password, iterations)
    }

    /// The same with so many iterations; few are only fit for tests.
    pub fn with_iterations(
        password: &str,
        iterations: NonZeroU32,
    ) -> Result<PasswordHash, PasswordHashError> {
        let mut salt = vec![0; SALT_BYTES];
        SystemRandom::new()
            .fill(&mut salt)
            .map_err(|_| PasswordHashError::Random)?;
        let mut hash = vec![0; HASH_BYTES];
        pbkdf2::derive(
            pbkdf2::PBKDF2_HMAC_SHA256,
            iterations,
            &salt,
            password.as_bytes(),
            &mut hash,
        );
        Ok(PasswordHash {
            iterations,
            salt,
            hash,
        })
    }

    /// Whether it is the hash of this password. Takes as long as the iterations say, right or wrong.
    pub fn verify(&self, password: &str) -> bool {
        pbkdf2::verify(
            pbkdf2::PBKDF2_HMAC_SHA256,
            self.iterations,
            &self.salt,
            password.as_bytes(),
            &self.hash,
        )
        .is_ok()
    }
}

impl std::fmt::Display for PasswordHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hex = |f: &mut std::fmt::Formatter<'_>, bytes: &[u8]| {
            f.write_str("$")?;
            bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
        };
        write!(f, "pbkdf2-sha256${}", self.iterations)?;
        hex(f, &self.salt)?;
        hex(f, &self.hash)
    }
}

impl std::str::FromStr for PasswordHash {
    type Err = PasswordHashError;

    fn from_str(text: &str) -> Result<PasswordHash, PasswordHashError> {
        let parts: Vec<&str> = text.trim().split('$').collect();
        let ["pbkdf2-sha256", iterations, salt, hash] = parts[..] else {
            return Err(PasswordHashError::Form);
        };
        let bytes = |text: &str| -> Option<Vec<u8>> {
            let pairs = text.as_bytes().chunks(2);
            pairs
                .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
                .collect()
        };
        let read = || {
            let iterations: NonZeroU32 = iterations.parse().ok()?;
            let (salt, hash) = (bytes(salt)?, bytes(hash)?);
            let right =
                iterations.get() <= ITERATIONS_MAX && salt.len() >= 8 && hash.len() == HASH_BYTES;
            right.then_some(PasswordHash {
                iterations,
                salt,
                hash,
            })
        };
        read().ok_or(PasswordHashError::Form)
    }
}

/// A user.
#[derive(Debug, Clone)]
pub struct User {
    /// What its password is checked against.
    pub password: PasswordHash,
    /// What it may do.
    pub rights: Arc<Rights>,
}

/// Who may connect.
#[derive(Debug, Clone, Default)]
pub struct Users {
    users: HashMap<String, User>,
}

impl Users {
    /// These.
    pub fn new(users: HashMap<String, User>) -> Users {
        Users { users }
    }

    /// Whether there are none, so that anybody may do everything.
    pub fn is_open(&self) -> bool {
        self.users.is_empty()
    }

    /// The rights of who knows this login and passcode. Takes long, by intent: not for a thread that has else to do.
    pub fn check(&self, login: Option<&str>, passcode: Option<&str>) -> Option<Arc<Rights>> {
        if self.is_open() {
            return Some(Arc::new(Rights::all()));
        }
        let (login, passcode) = (login.unwrap_or_default(), passcode.unwrap_or_default());
        match self.users.get(login) {
            Some(user) => user.password.verify(passcode).then(|| user.rights.clone()),
            None => {
                // A login that does not exist takes as long as one that does.
                if let Some(other) = self.users.values().next() {
                    other.password.verify(passcode);
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_read_back_and_knows_its_password() {
        let few = NonZeroU32::new(10).unwrap();
        let hash = PasswordHash::with_iterations("secret", few).unwrap();
        let again: PasswordHash = hash.to_string().parse().unwrap();
        assert_eq!(again, hash);
        assert!(again.verify("secret") && !again.verify("Secret"));
        assert_ne!(PasswordHash::with_iterations("secret", few).unwrap(), hash);
        for wrong in [
            "",
            "secret",
            "pbkdf2-sha256$0$00$00",
            "pbkdf2-sha256$1$zz$zz",
        ] {
            assert!(wrong.parse::<PasswordHash>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_hash_is_that_of_the_standard() {
        // RFC 7914, section 11: password "passwd", salt "salt", one iteration, the first 32 bytes. Our salts are longer,
        // so the reading is tried with ring's result for one of ours.
        let hash = PasswordHash {
            iterations: NonZeroU32::MIN,
            salt: b"salt".to_vec(),
            hash: vec![
                0x55, 0xac, 0x04, 0x6e, 0x56, 0xe3, 0x08, 0x9f, 0xec, 0x16, 0x91, 0xc2, 0x25, 0x44,
                0xb6, 0x05, 0xf9, 0x41, 0x85, 0x21, 0x6d, 0xde, 0x04, 0x65, 0xe6, 0x8b, 0x9d, 0x57,
                0xc2, 0x0d, 0xac, 0xbc,
            ],
        };
        assert!(hash.verify("passwd"));
    }

    #[test]
    fn who_is_unknown_has_no_rights_and_without_users_anybody_has_all() {
        assert!(Users::default().check(None, None).is_some());
        let password = PasswordHash::with_iterations("p", NonZeroU32::MIN).unwrap();
        let user = User {
            password,
            rights: Arc::new(Rights::default()),
        };
        let users = Users::new(HashMap::from([("u".to_owned(), user)]));
        assert!(users.check(Some("u"), Some("p")).is_some());
        assert!(users.check(Some("u"), Some("q")).is_none());
        assert!(users.check(Some("v"), Some("p")).is_none());
        assert!(users.check(None, None).is_none());
    }
}
