//! The `xbed` that the command line names: on a socket, or behind a message broker.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use xbee_api::client::{self, Client, Connector, Later, Stream};
use xbee_carry::identity::Files;
use xbee_carry::{Address, Options, Remote};

use crate::cli::Cli;
use crate::error::Error;

/// Names the server where `--server` does not.
pub const SERVER_VARIABLE: &str = "XBE_SERVER";
/// The same for `--identity`.
const IDENTITY_VARIABLE: &str = "XBE_IDENTITY";
/// The same for `--broker-ca`.
const CA_VARIABLE: &str = "XBE_BROKER_CA";

/// An option, or else the variable that stands for it.
// Not read by clap: its usage texts would show the option as one that was given.
fn given(option: Option<&PathBuf>, variable: &str) -> Option<PathBuf> {
    let variable = || env::var_os(variable).map(PathBuf::from);
    let given = option.cloned().or_else(variable);
    given.filter(|value| !value.as_os_str().is_empty())
}

/// The client of the server that was named.
///
/// # Errors
/// The address or the identity is wrong; nothing is connected yet.
pub fn client(cli: &Cli) -> Result<Client, Error> {
    let Some(uri) = server(cli) else {
        return Ok(Client::local());
    };
    if !Address::is_meant(&uri) {
        return Ok(Client::from_uri(&uri)?);
    }
    let address = uri.parse().map_err(Error::Address)?;
    queue(cli, uri, address)
}

fn server(cli: &Cli) -> Option<String> {
    let variable = || env::var_os(SERVER_VARIABLE).map(|uri| uri.to_string_lossy().into());
    let server: Option<String> = cli.server.clone().or_else(variable);
    server.filter(|uri| !uri.is_empty())
}

/// The client of an `xbed` that another one, which `own` talks to, has named. At the broker that `own` uses the user is the same.
///
/// # Errors
/// The address or the identity is wrong; nothing is connected yet.
pub fn told(cli: &Cli, own: &Client, uri: &str) -> Result<Client, Error> {
    if !Address::is_meant(uri) {
        if own.is_remote() {
            let server = uri.to_owned();
            return Err(Error::OtherMachine { server });
        }
        return Ok(Client::from_told_uri(uri)?);
    }
    let mut address: Address = uri.parse().map_err(Error::Told)?;
    let own = server(cli).filter(|own| Address::is_meant(own));
    if let Some(Ok(own)) = own.map(|own| own.parse::<Address>()) {
        let (own, other) = (own.broker, &mut address.broker);
        // A password is not said to another broker, nor in the clear where it was not.
        if (&own.host, own.port, own.tls) == (&other.host, other.port, other.tls) {
            (other.login, other.passcode) = (own.login, own.passcode);
        }
    }
    queue(cli, uri.to_owned(), address)
}

/// Who somebody said that they are.
pub fn given_identity(cli: &Cli) -> Option<PathBuf> {
    given(cli.identity.as_ref(), IDENTITY_VARIABLE)
}

/// The client of the `xbed` at a queue.
fn queue(cli: &Cli, uri: String, address: Address) -> Result<Client, Error> {
    let identity = given_identity(cli).unwrap_or_else(default_identity);
    let failed = |error: xbee_carry::Error| Error::from(remote_error(&address, error));
    let endpoint = Files::find(&identity)
        .and_then(|files| files.open(None))
        .map_err(|error| failed(error.into()))?;
    let options = Options {
        broker_ca: given(cli.broker_ca.as_ref(), CA_VARIABLE),
    };
    let remote = Remote::new(address, options, endpoint);
    Ok(Client::through(uri, Arc::new(Queue(remote))))
}

fn default_identity() -> PathBuf {
    let config = env::var_os("XDG_CONFIG_HOME").filter(|dir| !dir.is_empty());
    let config = config.map(PathBuf::from).unwrap_or_else(|| {
        let home = env::var_os("HOME").unwrap_or_default();
        PathBuf::from(home).join(".config")
    });
    config.join("xbee/pki")
}

/// What another `xbe` of this user needs in its environment to reach the same server. Not on its command line, which
/// everybody can read.
///
/// # Errors
/// The current directory is not known.
pub fn environment(cli: &Cli, client: &Client) -> Result<Vec<(&'static str, OsString)>, Error> {
    let failed = |source| Error::System {
        action: "find out the current directory",
        source,
    };
    let mut all = vec![(SERVER_VARIABLE, client.server().map_err(failed)?)];
    for (name, option) in [
        (IDENTITY_VARIABLE, &cli.identity),
        (CA_VARIABLE, &cli.broker_ca),
    ] {
        if let Some(path) = option {
            let path = std::path::absolute(path).map_err(failed)?;
            all.push((name, path.into_os_string()));
        }
    }
    Ok(all)
}

#[derive(Debug)]
struct Queue(Remote);

impl Connector for Queue {
    fn connect<'a>(
        &'a self,
        task: Option<&'a str>,
    ) -> Later<'a, Result<Box<dyn Stream>, client::Error>> {
        Box::pin(async move {
            match self.0.connect(task).await {
                Ok(carried) => Ok(Box::new(carried) as Box<dyn Stream>),
                Err(error) => Err(remote_error(self.0.address(), error)),
            }
        })
    }

    fn connect_all(&self) -> Later<'_, Result<Vec<Box<dyn Stream>>, client::Error>> {
        Box::pin(async {
            let all = self.0.connect_all().await;
            let all = all.map_err(|error| remote_error(self.0.address(), error))?;
            let boxed = |carried| Box::new(carried) as Box<dyn Stream>;
            Ok(all.into_iter().map(boxed).collect())
        })
    }

    fn close(&self) -> Later<'_, ()> {
        Box::pin(self.0.close())
    }
}

fn remote_error(address: &Address, error: xbee_carry::Error) -> client::Error {
    client::Error::Remote {
        server: address.to_string(),
        code: error.code(),
        is_transient: error.is_transient(),
        source: Box::new(error),
    }
}
