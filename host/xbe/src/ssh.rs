//! `ssh`: OpenSSH to a domain, through `xbed` and the domain's agent.

use std::ffi::{OsStr, OsString};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use tokio::signal::unix::SignalKind;
use xbee_api::SshAccess;
use xbee_api::client::Client;

use crate::cli;
use crate::error::Error;
use crate::exit;
use crate::signals::listen;

/// `ssh`.
///
/// `server` is what the environment of an `xbe` has to say to reach the same server.
pub async fn ssh(
    client: &Client,
    args: &cli::Ssh,
    server: &[(&str, OsString)],
) -> Result<u8, Error> {
    let task = client.status(&args.task).await?.id.to_string();
    let access = client.ssh(&task).await?;
    let host = format!("xbee-{task}");
    let dir = tempfile::Builder::new()
        .prefix("xbe-ssh-")
        .permissions(fs::Permissions::from_mode(0o700))
        .tempdir()
        .map_err(|source| Error::Write {
            path: std::env::temp_dir(),
            source,
        })?;
    let options = options(&task, &host, &access, dir.path())?;
    let status = call(&options, server, &access, &host, &args.args).await;
    // The key goes in any case; an error of `ssh` is the one to report.
    let removed = dir.close().map_err(|source| Error::System {
        action: "remove the temporary directory of the key",
        source,
    });
    let code = status?;
    removed?;
    Ok(code)
}

/// Writes the key and the known host, and names them in OpenSSH's options.
fn options(task: &str, host: &str, access: &SshAccess, dir: &Path) -> Result<Vec<OsString>, Error> {
    let mut key = access.private_key.clone();
    if !key.ends_with('\n') {
        key.push('\n');
    }
    let known = format!("{host} {}\n", access.host_key.trim());
    let key_path = dir.join("key");
    let known_path = dir.join("known_hosts");
    for (path, text) in [(&key_path, &key), (&known_path, &known)] {
        let mut open = OpenOptions::new();
        open.write(true).create_new(true).mode(0o600);
        open.open(path)
            .and_then(|mut file| file.write_all(text.as_bytes()))
            .map_err(|source| Error::Write {
                path: path.clone(),
                source,
            })?;
    }
    let xbe = std::env::current_exe().map_err(|source| Error::System {
        action: "find out xbe's own path",
        source,
    })?;
    let mut proxy = OsString::new();
    for word in [
        xbe.as_os_str(),
        OsStr::new("proxy"),
        OsStr::new(task),
        OsStr::new(&access.port.to_string()),
    ] {
        proxy.push(quoted(word));
        proxy.push(" ");
    }
    let mut options = vec![OsString::from("-F"), OsString::from("none")];
    let mut option = |name: &str, value: &OsStr| {
        let mut text = OsString::from(format!("{name}="));
        text.push(value);
        options.extend([OsString::from("-o"), text]);
    };
    option("ProxyCommand", &proxy);
    option("HostKeyAlias", OsStr::new(host));
    option("StrictHostKeyChecking", OsStr::new("yes"));
    option("UserKnownHostsFile", &path_option(&known_path));
    option("GlobalKnownHostsFile", OsStr::new("/dev/null"));
    option("UpdateHostKeys", OsStr::new("no"));
    option("IdentityFile", &path_option(&key_path));
    option("IdentitiesOnly", OsStr::new("yes"));
    option("IdentityAgent", OsStr::new("none"));
    option("PreferredAuthentications", OsStr::new("publickey"));
    Ok(options)
}

/// A word of the shell that runs a `ProxyCommand`, with OpenSSH's `%` taken as it is.
fn quoted(word: &OsStr) -> OsString {
    let mut quoted = vec![b'\''];
    for &byte in word.as_bytes() {
        match byte {
            b'\'' => quoted.extend(b"'\\''"),
            b'%' => quoted.extend(b"%%"),
            byte => quoted.push(byte),
        }
    }
    quoted.push(b'\'');
    OsStr::from_bytes(&quoted).to_owned()
}

/// A path in an option's value: quoted for its list syntax, with `%` taken as it is.
fn path_option(path: &Path) -> OsString {
    let mut quoted = vec![b'"'];
    for &byte in path.as_os_str().as_bytes() {
        match byte {
            b'%' => quoted.extend(b"%%"),
            b'"' | b'\\' => quoted.extend([b'\\', byte]),
            byte => quoted.push(byte),
        }
    }
    quoted.push(b'"');
    OsStr::from_bytes(&quoted).to_owned()
}

/// Runs OpenSSH to its end, whatever signals come meanwhile: the key has to be removed.
async fn call(
    options: &[OsString],
    server: &[(&str, OsString)],
    access: &SshAccess,
    host: &str,
    args: &[String],
) -> Result<u8, Error> {
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    let mut ssh = tokio::process::Command::new("ssh")
        .args(options)
        .envs(server.iter().map(|(name, value)| (name, value)))
        .arg("-l")
        .arg(&access.user)
        .arg(host)
        .args(args)
        .spawn()
        .map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::NoSsh,
            _ => Error::System {
                action: "start ssh",
                source,
            },
        })?;
    loop {
        tokio::select! {
            status = ssh.wait() => {
                let status = status
                    .map_err(|source| Error::System { action: "wait for ssh", source })?;
                let signal = status.signal().map(|signal| 128 + signal);
                return Ok(exit::of_command(status.code().or(signal).unwrap_or(255)));
            }
            // The terminal sends it to ssh as well.
            _ = interrupt.recv() => {}
            _ = terminate.recv() => kill(&mut ssh)?,
            _ = hangup.recv() => kill(&mut ssh)?,
        }
    }
}

fn kill(ssh: &mut tokio::process::Child) -> Result<(), Error> {
    ssh.start_kill().map_err(|source| Error::System {
        action: "end ssh",
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell_and_openssh() {
        assert_eq!(
            quoted(OsStr::new("/a b/it's 100%")),
            "'/a b/it'\\''s 100%%'"
        );
        assert_eq!(path_option(Path::new("/a b/\"%\"")), "\"/a b/\\\"%%\\\"\"");
    }
}
