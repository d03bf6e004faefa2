//! Guests' interfaces on a bridge of the host, for back ends that have one: puts them there, in place of scripts that run
//! dozens of programs for each start and each end of a domain, and says who may send what there. It fills the sets of the firewall in `xen-configs/dom0/xenbee.nft`
//! with the ports of running domains, through `nft` and its JSON (libnftables-json(5)).
//!
//! What is in the sets is made what it shall be, not changed by what happened: so a start that was
//! cut off, a restart of this process and a reload of the rules are all mended by the next change.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io;
use std::net::Ipv6Addr;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::domain::{DomainId, DomainSpec, Interface};
use crate::error::{Error, chain};
use crate::work::blocking;

/// The tables; `install` in `xen-configs/dom0` makes them.
const TABLE: &str = "xenbee";
/// The sets that are filled.
const PAIRS: &str = "pairs";
const MACS: &str = "macs";
const ADDRESSES: &str = "addresses";
const TARGETS: &str = "targets";
const SETS: [&str; 4] = [PAIRS, MACS, ADDRESSES, TARGETS];

const REMEDY: &str = "load xen-configs/dom0/xenbee.nft with nft -f (on a Xen host, xen-configs/dom0/install has it loaded at each \
                      start), or set firewall = \"off\" in the back end's table of xbed's configuration where other rules keep \
                      guests apart";

/// No call of `nft` or `ip` takes longer on a host that works.
const CALL_LIMIT: Duration = Duration::from_secs(20);

/// An interface's place on the bridge.
#[derive(Debug, Clone)]
struct Port {
    /// The name that the host has for it; the rules want it to begin with `vif`.
    name: String,
    domain: DomainId,
    owner: String,
    interface: Interface,
    /// Seen to be on the bridge.
    joined: bool,
}

impl Port {
    fn sees(&self, other: &Port) -> bool {
        let both = self.interface.peers && other.interface.peers;
        both && !self.owner.is_empty() && self.owner == other.owner && self.domain != other.domain
    }
}

/// Tells whom it concerns that a port is on the bridge.
pub(crate) type Announce = fn(&str) -> Result<(), Error>;

/// The ports of this process's domains and the firewall between them.
#[derive(Debug)]
pub(crate) struct Network {
    /// `nft` and the arguments before its own; empty: no firewall is kept.
    nft: Vec<OsString>,
    bridge: String,
    announce: Announce,
    ports: Mutex<BTreeMap<DomainId, Vec<Port>>>,
    turn: tokio::sync::Mutex<()>,
}

/// What is in a set: a set's name and an element's parts.
type Element = (&'static str, [String; 2]);

impl Network {
    /// `firewall`: whether rules are there and shall be kept.
    pub(crate) fn new(firewall: bool, bridge: &str, announce: Announce) -> Self {
        let nft = firewall.then(|| "nft".into()).into_iter().collect();
        Self::with(nft, bridge, announce)
    }

    fn with(nft: Vec<OsString>, bridge: &str, announce: Announce) -> Self {
        Self {
            nft,
            bridge: bridge.to_owned(),
            announce,
            ports: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<DomainId, Vec<Port>>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a domain may be started that has this interface.
    ///
    /// # Errors
    /// [`Error::Firewall`] where the rules are not there.
    pub(crate) async fn check(&self, interface: Option<&Interface>) -> Result<(), Error> {
        if self.nft.is_empty() || interface.is_none() {
            return Ok(());
        }
        self.elements().await?;
        let rules = self.list("inet").await?;
        if !objects(&rules, "chain").any(|chain| chain["hook"] == "input") {
            return Err(lacking("table inet xenbee has no rules for input"));
        }
        Ok(())
    }

    /// Notes what interfaces a domain that runs has, each with its port's name, without doing anything about it yet.
    pub(crate) fn note(&self, spec: &DomainSpec, interfaces: Vec<(String, Interface)>) {
        let ports: Vec<Port> = interfaces
            .into_iter()
            .map(|(name, interface)| Port {
                name,
                domain: spec.id,
                owner: spec.owner.clone(),
                interface,
                joined: false,
            })
            .collect();
        if ports.is_empty() {
            self.lock().remove(&spec.id);
        } else {
            self.lock().insert(spec.id, ports);
        }
    }

    /// Takes everything away from a domain that has ended.
    pub(crate) async fn leave(&self, id: DomainId) -> Result<(), Error> {
        self.withdraw(id, |_| true).await
    }

    /// Takes away the port of an interface that its domain shall have no more.
    pub(crate) async fn leave_one(&self, id: DomainId, mac: [u8; 6]) -> Result<(), Error> {
        self.withdraw(id, |port| port.interface.mac == mac).await
    }

    async fn withdraw(&self, id: DomainId, which: impl Fn(&Port) -> bool) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        let before = wanted(&self.ports());
        if let Some(ports) = self.lock().get_mut(&id) {
            ports.retain(|port| !which(port));
        }
        self.lock().retain(|_, ports| !ports.is_empty());
        // What else there may be is for the next start to mend.
        self.change(difference(&before, &wanted(&self.ports()), |_| true))
            .await
    }

    /// Makes the sets what they shall be, and then puts on the bridge what is not there: of this domain if one is
    /// named, and of all others as far as it goes.
    pub(crate) async fn apply(&self, id: Option<DomainId>) -> Result<(), Error> {
        let _turn = self.turn.lock().await;
        self.fill_sets().await?;
        let ports = self.lock().clone();
        let mut result = Ok(());
        for (owner, ports) in ports {
            for port in ports.iter().filter(|port| !port.joined) {
                match self.join(&port.name).await {
                    Ok(()) => self.joined(owner, &port.name),
                    Err(error) if Some(owner) == id => result = Err(error),
                    Err(error) => {
                        // One that has ended is seen in its turn.
                        tracing::warn!(domain = %owner, error = chain(&error), "not on the bridge");
                    }
                }
            }
        }
        result
    }

    fn joined(&self, id: DomainId, name: &str) {
        for port in self.lock().get_mut(&id).into_iter().flatten() {
            port.joined |= port.name == name;
        }
    }

    /// Puts a port on the bridge; one that is on it stays.
    async fn join(&self, port: &str) -> Result<(), Error> {
        let bridge = &self.bridge;
        let lacking = |detail: String| Error::Bridge {
            port: port.to_owned(),
            bridge: bridge.clone(),
            detail,
        };
        if !Path::new(&format!("/sys/class/net/{bridge}/brif/{port}")).exists() {
            // A port of another size would give the whole bridge its size.
            let mtu = tokio::fs::read_to_string(format!("/sys/class/net/{bridge}/mtu"))
                .await
                .map_err(|error| lacking(format!("the bridge: {error}")))?;
            // The host itself has nothing to say there.
            let settings = "multicast off arp off addrgenmode none up";
            let output = tokio::time::timeout(
                CALL_LIMIT,
                Command::new("ip")
                    .args(["link", "set", "dev", port, "mtu", mtu.trim()])
                    .args(["master", bridge])
                    .args(settings.split(' '))
                    .stdin(Stdio::null())
                    .kill_on_drop(true)
                    .output(),
            )
            .await
            .unwrap_or_else(|elapsed| Err(io::Error::new(io::ErrorKind::TimedOut, elapsed)))
            .map_err(|error| lacking(format!("ip cannot be run: {error}")))?;
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr);
                let line = said.lines().next().unwrap_or("failed without a word");
                return Err(lacking(format!("ip link set: {line}")));
            }
        }
        let (announce, port) = (self.announce, port.to_owned());
        blocking(move || announce(&port)).await
    }

    fn ports(&self) -> Vec<Port> {
        self.lock().values().flatten().cloned().collect()
    }

    /// Makes the sets what they shall be: of other processes' ports only those are touched that
    /// are not there any more.
    async fn fill_sets(&self) -> Result<(), Error> {
        if self.nft.is_empty() {
            return Ok(());
        }
        let present = self.elements().await?;
        let ports = self.ports();
        let commands = difference(&present, &wanted(&ports), |port| {
            ports.iter().any(|ours| ours.name == port)
                || !Path::new("/sys/class/net").join(port).exists()
        });
        self.change(commands).await
    }

    /// Runs commands in one transaction.
    async fn change(&self, commands: Vec<Value>) -> Result<(), Error> {
        if commands.is_empty() {
            return Ok(());
        }
        self.run(&["-j", "-f", "-"], json!({ "nftables": commands }))
            .await
            .map(drop)
    }

    /// What is in the sets.
    async fn elements(&self) -> Result<BTreeSet<Element>, Error> {
        let table = self.list("bridge").await?;
        let mut elements = BTreeSet::new();
        for name in SETS {
            let set = objects(&table, "set")
                .find(|set| set["name"] == name)
                .ok_or_else(|| lacking(format!("table bridge xenbee has no set {name}")))?;
            for element in set["elem"].as_array().into_iter().flatten() {
                if let Some([Value::String(port), Value::String(other)]) =
                    element["concat"].as_array().map(Vec::as_slice)
                {
                    elements.insert((name, [port.clone(), other.clone()]));
                }
            }
        }
        for hook in ["prerouting", "forward"] {
            if !objects(&table, "chain").any(|chain| chain["hook"] == hook) {
                return Err(lacking(format!(
                    "table bridge xenbee has no rules for {hook}"
                )));
            }
        }
        Ok(elements)
    }

    async fn list(&self, family: &str) -> Result<Value, Error> {
        let text = self
            .run(&["-j", "list", "table", family, TABLE], Value::Null)
            .await?;
        serde_json::from_slice(&text).map_err(|error| lacking(format!("nft's answer: {error}")))
    }

    /// Runs `nft`; it ends when this is dropped or too slow.
    async fn run(&self, args: &[&str], input: Value) -> Result<Vec<u8>, Error> {
        let Some((program, first)) = self.nft.split_first() else {
            return Ok(Vec::new());
        };
        let run = async {
            let mut child = Command::new(program)
                .args(first)
                .args(args)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .kill_on_drop(true)
                .spawn()?;
            let mut stdin = child.stdin.take();
            let write = async move {
                // A program that ends without reading says why by itself.
                if let (Some(stdin), false) = (&mut stdin, input.is_null()) {
                    let _ = stdin.write_all(input.to_string().as_bytes()).await;
                }
            };
            let ((), output) = tokio::join!(write, child.wait_with_output());
            output
        };
        let output = tokio::time::timeout(CALL_LIMIT, run)
            .await
            .unwrap_or_else(|elapsed| Err(io::Error::new(io::ErrorKind::TimedOut, elapsed)))
            .map_err(|error| lacking(format!("nft cannot be run: {error}")))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(lacking(format!(
            "nft {}: {}",
            args.join(" "),
            said.lines().next().unwrap_or("failed without a word")
        )))
    }
}

fn lacking(detail: impl Into<String>) -> Error {
    Error::Firewall {
        detail: detail.into(),
        remedy: REMEDY,
    }
}

/// The objects of a kind in what `nft -j list` prints.
fn objects<'a>(listing: &'a Value, kind: &'static str) -> impl Iterator<Item = &'a Value> {
    let all = listing["nftables"].as_array().into_iter().flatten();
    all.filter_map(move |object| object.get(kind))
}

/// What shall be in the sets for these ports.
fn wanted(ports: &[Port]) -> BTreeSet<Element> {
    let mut elements = BTreeSet::new();
    for port in ports {
        let mut add = |set, value| elements.insert((set, [port.name.clone(), value]));
        let mac = port.interface.mac;
        add(MACS, mac.map(|byte| format!("{byte:02x}")).join(":"));
        for address in [port.interface.address, link_local(mac)] {
            add(ADDRESSES, address.to_string());
            add(TARGETS, format!("{:#x}", address.to_bits()));
        }
        for other in ports.iter().filter(|other| port.sees(other)) {
            add(PAIRS, other.name.clone());
        }
    }
    elements
}

/// The address that every interface gives itself (RFC 4291, appendix A).
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    let interface = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    Ipv6Addr::from_bits(0xfe80 << 112 | u128::from(u64::from_be_bytes(interface)))
}

/// Commands that make `present` into `wanted`, in one transaction. `may_touch` says whether a port
/// is ours, or nobody's any more.
fn difference(
    present: &BTreeSet<Element>,
    wanted: &BTreeSet<Element>,
    may_touch: impl Fn(&str) -> bool,
) -> Vec<Value> {
    let mut commands = Vec::new();
    let mut command = |verb: &str, (set, parts): &Element| {
        let element = json!({ "family": "bridge", "table": TABLE, "name": set,
                              "elem": [{ "concat": parts }] });
        commands.push(json!({ verb: { "element": element } }));
    };
    for element in present.difference(wanted) {
        let (set, [port, other]) = element;
        if may_touch(port) || (*set == PAIRS && may_touch(other)) {
            // Another process may have removed it, and removing what is not there fails.
            command("add", element);
            command("delete", element);
        }
    }
    for element in wanted.difference(present) {
        command("add", element);
    }
    commands
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command as Blocking;
    use uuid::Uuid;

    fn port(domid: u32, owner: &str, peers: bool) -> Port {
        Port {
            name: format!("vif{domid}.0"),
            domain: Uuid::from_u128(domid.into()),
            owner: owner.to_owned(),
            interface: Interface {
                mac: [2, 0xbe, 0, 0, 0, domid as u8],
                address: Ipv6Addr::from_bits(0xfd00 << 112 | u128::from(domid)),
                peers,
            },
            joined: true,
        }
    }

    fn pairs(ports: &[Port]) -> Vec<String> {
        let all = wanted(ports);
        let pairs = all.iter().filter(|(set, _)| *set == PAIRS);
        pairs.map(|(_, parts)| parts.join(">")).collect()
    }

    #[test]
    fn only_domains_of_one_owner_that_both_asked_see_each_other() {
        let ports = [
            port(1, "a", true),
            port(2, "a", true),
            port(3, "a", false),
            port(4, "b", true),
            port(5, "", true),
            port(6, "", true),
        ];
        assert_eq!(pairs(&ports), ["vif1.0>vif2.0", "vif2.0>vif1.0"]);
    }

    #[test]
    fn the_link_local_address_is_the_one_that_linux_gives_itself() {
        let address = link_local([0x02, 0xbe, 0, 0, 0, 5]);
        assert_eq!(address.to_string(), "fe80::be:ff:fe00:5");
    }

    #[test]
    fn ports_of_others_are_left_alone_while_they_are_there() {
        let present = wanted(&[port(1, "a", true), port(2, "a", true), port(7, "b", true)]);
        let commands = difference(&present, &wanted(&[port(1, "a", true)]), |port| {
            port == "vif1.0" || port == "vif2.0"
        });
        let text = Value::from(commands).to_string();
        assert!(
            text.contains("vif2.0") && !text.contains("vif7.0"),
            "{text}"
        );
        assert!(!text.contains(r#"["vif1.0","02:be"#), "{text}");
    }

    /// A network namespace with the rules of `xen-configs`.
    struct Namespace(String);

    impl Namespace {
        fn new() -> Option<Self> {
            if !rustix::process::geteuid().is_root() {
                println!("skipped: a network namespace of one's own needs root");
                return None;
            }
            let name = format!("xbee-nft-{}", std::process::id());
            let made = Blocking::new("ip").args(["netns", "add", &name]).status();
            assert!(made.unwrap().success());
            Some(Self(name))
        }

        fn nft(&self) -> Vec<OsString> {
            let words = ["ip", "netns", "exec", &self.0, "nft"];
            words.into_iter().map(OsString::from).collect()
        }

        fn load(&self, rules: &str) {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../xen-configs/dom0");
            let nft = self.nft();
            let mut command = Blocking::new(&nft[0]);
            command.args(&nft[1..]).arg("-f").arg(path.join(rules));
            assert!(command.status().unwrap().success());
        }
    }

    impl Drop for Namespace {
        fn drop(&mut self) {
            let _ = Blocking::new("ip").args(["netns", "del", &self.0]).status();
        }
    }

    #[tokio::test]
    async fn the_sets_become_what_they_shall_be() {
        let Some(namespace) = Namespace::new() else {
            return;
        };
        let network = Network::with(namespace.nft(), "xenbr0", |_| Ok(()));
        let interface = port(1, "a", true).interface;
        let error = network.check(Some(&interface)).await.unwrap_err();
        assert_eq!(error.code(), "firewall");
        assert!(
            error.to_string().contains("xen-configs/dom0/install"),
            "{error}"
        );
        // Without an interface none is needed.
        network.check(None).await.unwrap();
        namespace.load("xenbee.nft");
        network.check(Some(&interface)).await.unwrap();
        let ids = [1, 2].map(|domid| {
            // No port of this machine has such numbers.
            let port = port(60_000 + domid, "a", true);
            let id = Uuid::from_u128(u128::from(domid));
            network.lock().insert(id, vec![port]);
            id
        });
        network.apply(None).await.unwrap();
        let ports = network.ports();
        assert_eq!(network.elements().await.unwrap(), wanted(&ports));
        // Nothing is done twice, and what is gone is mended.
        network.apply(None).await.unwrap();
        namespace.load("xenbee.nft");
        network.apply(None).await.unwrap();
        assert_eq!(network.elements().await.unwrap(), wanted(&ports));
        network.leave(ids[0]).await.unwrap();
        assert_eq!(network.elements().await.unwrap(), wanted(&ports[1..]));
        // What a process left that is no more.
        let network = Network::with(namespace.nft(), "xenbr0", |_| Ok(()));
        network.apply(None).await.unwrap();
        assert_eq!(network.elements().await.unwrap(), BTreeSet::new());
    }
}
