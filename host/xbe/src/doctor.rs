//! `doctor`: what this machine lacks to run domains, and what to do about it.
//!
//! Looks with its own eyes, without `xbed`: it is for the time before `xbed` starts.

mod registry;

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Serialize;
use tokio::process::Command;

use crate::cli;
use crate::error::Error;
use crate::exit;
use crate::remote;
use crate::term;

/// No program that is asked here takes longer.
const PROGRAM_LIMIT: Duration = Duration::from_secs(20);
/// Least memory that leaves room for one domain of the default size, MiB.
const MEMORY_MIN_MIB: u64 = 256;
/// Least room for overlays and staged files, MiB.
const DISK_MIN_MIB: u64 = 1024;
/// Oldest Xen with which the back end is tested.
const XEN_TESTED: (u32, u32) = (4, 17);
/// Oldest QEMU with which the back end is tested.
const QEMU_TESTED: (u32, u32) = (7, 2);

/// What came of looking at one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Health {
    /// As it should be.
    Ok,
    /// Domains run, but worse than they could.
    Warning,
    /// No domain runs before this is mended.
    Missing,
}

/// One line of the report.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// What was looked at; stable.
    check: &'static str,
    health: Health,
    /// What was found.
    found: String,
    /// What to do; `None` where all is well.
    remedy: Option<String>,
}

impl Finding {
    fn new(check: &'static str, look: Look) -> Finding {
        let (health, found, remedy) = match look {
            Ok(found) => (Health::Ok, found, None),
            Err((health, found, remedy)) => (health, found, Some(remedy)),
        };
        Finding {
            check,
            health,
            found,
            remedy,
        }
    }
}

/// What one look has to say: what was found, or also how bad that is and what to do.
type Look = Result<String, (Health, String, String)>;

fn missing<T>(
    found: impl Into<String>,
    remedy: impl Into<String>,
) -> Result<T, (Health, String, String)> {
    Err((Health::Missing, found.into(), remedy.into()))
}

fn warning<T>(
    found: impl Into<String>,
    remedy: impl Into<String>,
) -> Result<T, (Health, String, String)> {
    Err((Health::Warning, found.into(), remedy.into()))
}

/// The machine that is looked at.
struct Machine {
    /// Its root directory: another one than `/` in tests.
    root: PathBuf,
    /// Where programs are, as in the variable `PATH`.
    path: OsString,
    /// Where the images are.
    images: PathBuf,
    /// The bridge that domains' network interfaces join.
    bridge: String,
    /// Where this program is, and with it the others of its release.
    programs: Option<PathBuf>,
}

/// `doctor`.
pub async fn doctor(cli: &cli::Cli, args: &cli::Doctor) -> Result<u8, Error> {
    let machine = Machine {
        root: "/".into(),
        path: env::var_os("PATH").unwrap_or_default(),
        images: images(),
        bridge: args.bridge.clone(),
        programs: env::current_exe()
            .ok()
            .and_then(|program| program.parent().map(PathBuf::from)),
    };
    let mut findings = machine.examine(args.backend).await;
    if let Some(address) = &args.registry {
        let identity = remote::given_identity(cli);
        let look = registry::look(address.clone(), identity.as_deref());
        findings.push(Finding::new("registry", look.await));
    }
    for finding in &findings {
        if args.json.json {
            term::json(finding)?;
            continue;
        }
        let word = match finding.health {
            Health::Ok => "ok",
            Health::Warning => "warning",
            Health::Missing => "missing",
        };
        let found = term::clean_line(&finding.found);
        term::out(format_args!("{word:<8} {:<14} {found}", finding.check))?;
        if let Some(remedy) = &finding.remedy {
            term::out(format_args!("{:<23} -> {remedy}", ""))?;
        }
    }
    let ill = findings
        .iter()
        .any(|finding| finding.health == Health::Missing);
    Ok(if ill { exit::INVALID } else { 0 })
}

/// The directory of images that `xbed` uses unless told otherwise.
fn images() -> PathBuf {
    if let Some(directory) = env::var_os("XBEE_IMAGES") {
        return directory.into();
    }
    let home = env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cache = env::var_os("XDG_CACHE_HOME").map_or_else(|| home.join(".cache"), PathBuf::from);
    cache.join("xbee/images")
}

impl Machine {
    async fn examine(&self, backend: Option<cli::DoctorBackend>) -> Vec<Finding> {
        let backend = backend.unwrap_or(match self.is_xen() {
            true => cli::DoctorBackend::Xen,
            false => cli::DoctorBackend::Qemu,
        });
        let mut findings = vec![];
        let mut add = |check, look: Look| findings.push(Finding::new(check, look));
        match backend {
            cli::DoctorBackend::Xen => {
                add("xen", self.xen());
                add("dom0", self.dom0());
                add("devices", self.devices());
                add("back-ends", self.back_ends());
                add("xenstore", self.xenstore());
                add("libvirt", self.libvirt());
                add("libxl driver", self.libxl_driver());
                add("bridge", self.bridge());
                add("firewall", self.firewall().await);
                let info = self.run("xl", &["info"]).await;
                add("memory", xen_memory(&info));
                add("dom0 memory", dom0_memory(&info));
                add(
                    "qemu-img",
                    self.program("qemu-img", "qemu-utils").map(display),
                );
            }
            cli::DoctorBackend::Qemu => {
                add("qemu", self.qemu().await);
                add(
                    "qemu-img",
                    self.program("qemu-img", "qemu-utils").map(display),
                );
                add("kvm", self.kvm());
                add("cage", self.cage().await);
                add("memory", self.memory());
            }
        }
        add("ssh", self.program("ssh", "openssh-client").map(display));
        add("image base", self.base_image());
        add("disk", self.disk());
        findings
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn text(&self, path: &str) -> io::Result<String> {
        fs::read_to_string(self.at(path)).map(|text| text.trim().to_owned())
    }

    fn is_xen(&self) -> bool {
        self.text("/sys/hypervisor/type")
            .is_ok_and(|kind| kind == "xen")
    }

    fn xen(&self) -> Look {
        if !self.is_xen() {
            return missing(
                "this machine does not run on Xen",
                "apt-get install xen-system-amd64, then boot the entry \"with Xen hypervisor\"; \
                 or use the qemu back end",
            );
        }
        let part = |name: &str| self.text(&format!("/sys/hypervisor/version/{name}")).ok();
        let number = |name| part(name).and_then(|text| text.parse().ok());
        let (Some(major), Some(minor)) = (number("major"), number("minor")) else {
            return warning(
                "the version of Xen cannot be read in /sys/hypervisor/version",
                "load the module xen_sysfs or use a kernel with CONFIG_SYS_HYPERVISOR",
            );
        };
        let version = format!("Xen {major}.{minor}{}", part("extra").unwrap_or_default());
        if (major, minor) < XEN_TESTED {
            let (major, minor) = XEN_TESTED;
            return warning(
                version,
                format!("the back end is tested with Xen {major}.{minor} and newer: upgrade"),
            );
        }
        Ok(version)
    }

    fn dom0(&self) -> Look {
        match self.text("/proc/xen/capabilities") {
            Ok(text) if text.contains("control_d") => Ok("this is the control domain".into()),
            Ok(_) => missing(
                "this is a guest domain, not the control domain",
                "run xbed in dom0",
            ),
            Err(_) => missing(
                "/proc/xen/capabilities cannot be read",
                "in dom0: mount -t xenfs xenfs /proc/xen (systemd does it by proc-xen.mount)",
            ),
        }
    }

    fn devices(&self) -> Look {
        let wanted = [
            ("evtchn", "xen-evtchn"),
            ("gntdev", "xen-gntdev"),
            ("gntalloc", "xen-gntalloc"),
            ("privcmd", "xen-privcmd"),
            ("xenbus", "xenfs"),
        ];
        let lacking: Vec<_> = wanted
            .iter()
            .filter(|(device, _)| !self.at(&format!("/dev/xen/{device}")).exists())
            .collect();
        if lacking.is_empty() {
            return Ok("/dev/xen has what the agents' channels need".into());
        }
        let names: Vec<_> = lacking
            .iter()
            .map(|(device, _)| format!("/dev/xen/{device}"))
            .collect();
        let modules: Vec<_> = lacking.iter().map(|(_, module)| *module).collect();
        missing(
            format!("{} not there", names.join(", ")),
            format!(
                "modprobe -a {}; to keep it, name them in /etc/modules-load.d/xen.conf",
                modules.join(" ")
            ),
        )
    }

    fn back_ends(&self) -> Look {
        // Built into the kernel or loaded, a back-end driver is in sysfs.
        let wanted = [("vif", "xen-netback"), ("vbd", "xen-blkback")];
        let lacking: Vec<_> = wanted
            .iter()
            .filter(|(driver, _)| {
                !self
                    .at(&format!("/sys/bus/xen-backend/drivers/{driver}"))
                    .exists()
            })
            .map(|(_, module)| *module)
            .collect();
        if lacking.is_empty() {
            return Ok("network and block back ends are loaded".into());
        }
        missing(
            format!("the drivers {} are not loaded", lacking.join(", ")),
            format!("modprobe -a {}", lacking.join(" ")),
        )
    }

    fn xenstore(&self) -> Look {
        let socket = self.at("/run/xenstored/socket");
        match UnixStream::connect(&socket) {
            Ok(_) => Ok("xenstored answers".into()),
            Err(error) => missing(
                format!("xenstored does not answer at {}: {error}", socket.display()),
                "systemctl start xenstored xen-init-dom0 xenconsoled",
            ),
        }
    }

    fn libvirt(&self) -> Look {
        // The monolithic daemon's socket, or the modular one's (libvirt 7.0 and newer).
        let sockets = ["/run/libvirt/libvirt-sock", "/run/libvirt/virtxend-sock"];
        let answers = sockets
            .iter()
            .find(|path| UnixStream::connect(self.at(path)).is_ok());
        match answers {
            Some(path) => Ok(format!("libvirt answers at {path}")),
            None => missing(
                "libvirt does not answer",
                "apt-get install libvirt-daemon-system libvirt-daemon-driver-xen && systemctl start libvirtd",
            ),
        }
    }

    fn libxl_driver(&self) -> Look {
        let driver = "libvirt/connection-driver/libvirt_driver_libxl.so";
        let found = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"]
            .iter()
            .map(|directory| format!("{directory}/{driver}"))
            .find(|path| self.at(path).exists());
        match found {
            Some(path) => Ok(path),
            None => missing(
                "libvirt has no driver for Xen",
                "apt-get install libvirt-daemon-driver-xen && systemctl restart libvirtd",
            ),
        }
    }

    fn bridge(&self) -> Look {
        let bridge = &self.bridge;
        if !self.at(&format!("/sys/class/net/{bridge}/bridge")).exists() {
            return missing(
                format!("there is no bridge {bridge}"),
                format!(
                    "ip link add {bridge} type bridge && ip link set {bridge} up; xen-configs/README.md makes it last"
                ),
            );
        }
        let addresses = self.text("/proc/net/if_inet6").unwrap_or_default();
        // Scope 0x00 is global, which unique local addresses are (proc_net(5), RFC 4193).
        let has_address = addresses.lines().any(|line| {
            let fields: Vec<_> = line.split_whitespace().collect();
            matches!(fields[..], [_, _, _, "00", _, name] if name == bridge)
        });
        if !has_address {
            return warning(
                format!("the bridge {bridge} has no IPv6 address"),
                format!(
                    "ip -6 address add fd00:.../64 dev {bridge}, of a prefix of your own (RFC 4193)"
                ),
            );
        }
        Ok(format!("{bridge}, with an IPv6 address"))
    }

    async fn firewall(&self) -> Look {
        let remedy = "xen-configs/dom0/install, then nft -f /etc/nftables.d/xenbee.nft; until then domains with a \
                      network are refused, unless xbed is told firewall = \"off\"";
        let mut lacking = vec![];
        // What the rules of the same release have, and those of earlier ones do not.
        for (family, kind, wanted) in [
            (
                "bridge",
                "set",
                &["pairs", "macs", "addresses", "targets"][..],
            ),
            ("bridge", "chain", &["source", "forward"]),
            ("inet", "chain", &["input", "forward"]),
        ] {
            let args = ["-j", "list", "table", family, "xenbee"];
            let text = match self.run("nft", &args).await {
                Ok(text) => text,
                Err(why) => return missing(why, remedy),
            };
            let listing: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            let objects = || listing["nftables"].as_array().into_iter().flatten();
            for name in wanted {
                if !objects().any(|object| object[kind]["name"] == *name) {
                    lacking.push(format!("{kind} {name} of table {family} xenbee"));
                }
            }
        }
        if lacking.is_empty() {
            return Ok("the rules that keep guests apart are loaded".into());
        }
        missing(format!("not there: {}", lacking.join(", ")), remedy)
    }

    async fn qemu(&self) -> Look {
        let program = "qemu-system-x86_64";
        self.program(program, "qemu-system-x86")?;
        let text = match self.run(program, &["--version"]).await {
            Ok(text) => text,
            Err(why) => return missing(why, "apt-get install --reinstall qemu-system-x86"),
        };
        let line = text.lines().next().unwrap_or_default().to_owned();
        let version = line.split_whitespace().find_map(|word| {
            let (major, rest) = word.split_once('.')?;
            let minor = rest.split('.').next()?;
            Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
        });
        match version {
            Some(version) if version >= QEMU_TESTED => Ok(line),
            _ => {
                let (major, minor) = QEMU_TESTED;
                warning(
                    line,
                    format!("the back end is tested with QEMU {major}.{minor} and newer: upgrade"),
                )
            }
        }
    }

    fn kvm(&self) -> Look {
        // Whether guests boot with it only a guest can tell: xbed tries one.
        match fs::File::options()
            .read(true)
            .write(true)
            .open(self.at("/dev/kvm"))
        {
            Ok(_) => Ok("/dev/kvm opens; `xbe host` says whether guests boot with it".into()),
            Err(error) => warning(
                format!("/dev/kvm cannot be used ({error}): guests run 5 to 20 times slower"),
                "switch virtualization on in the firmware, modprobe kvm_intel or kvm_amd, and join the group kvm",
            ),
        }
    }

    /// What this host has to keep a QEMU in that its guest has taken over; for whoever asks, which may be less than
    /// root gets.
    async fn cage(&self) -> Look {
        let remedy = "run xbed as root, on Linux 6.12 or later with landlock among the LSMs, in a control group that is its \
                      own to divide (systemd: Delegate=yes, DelegateSubgroup=xbed); what is missing, QEMU's other \
                      fences must hold: docs/threat-model.md";
        let program = self
            .programs
            .as_ref()
            .map(|directory| directory.join("cage"))
            .filter(|program| program.is_file());
        let Some(program) = program else {
            return missing(
                "the program cage is not beside xbe",
                "cargo build --release -p xbee-cage, and install it beside xbed",
            );
        };
        let text = match ask("cage", &program, &["--check"]).await {
            Ok(text) => text,
            Err(why) => return missing(why, remedy),
        };
        let report: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let findings = report["findings"].as_array().into_iter().flatten();
        let say = |finding: &serde_json::Value| {
            let text = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
            format!("{} ({})", text("part"), text("found"))
        };
        let (held, gaps): (Vec<_>, Vec<_>) = findings.partition(|finding| finding["holds"] == true);
        let join = |findings: Vec<_>| findings.into_iter().map(say).collect::<Vec<_>>().join(", ");
        let (held, gaps) = (join(held), join(gaps));
        match (held.as_str(), gaps.as_str()) {
            ("", "") => missing("cage --check says what is no report", remedy),
            (_, "") => Ok(held),
            ("", _) => warning(format!("nothing holds: {gaps}"), remedy),
            _ => warning(format!("{held}; gaps: {gaps}"), remedy),
        }
    }

    fn memory(&self) -> Look {
        let text = self.text("/proc/meminfo").unwrap_or_default();
        let available = text
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"))
            .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
            .map(|kib| kib / 1024);
        enough_memory(available, "/proc/meminfo")
    }

    fn base_image(&self) -> Look {
        let wanted = ["kernel/vmlinux", "base/initramfs.cpio"];
        let lacking = wanted
            .iter()
            .map(|name| self.images.join(name))
            .find(|path| !path.exists());
        match lacking {
            None => Ok(display(self.images.clone())),
            Some(path) => missing(format!("{} is not there", path.display()), "make images"),
        }
    }

    fn disk(&self) -> Look {
        let directory = self.at("/var/lib");
        match rustix::fs::statvfs(&directory) {
            Ok(stat) => {
                let free = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
                let found = format!("{free} MiB free at {}", directory.display());
                if free < DISK_MIN_MIB {
                    return warning(
                        found,
                        "overlays and staged files need room: free some, or use another --data",
                    );
                }
                Ok(found)
            }
            Err(error) => warning(
                format!("{}: {error}", directory.display()),
                "make the directory",
            ),
        }
    }

    fn program(&self, name: &str, package: &str) -> Result<PathBuf, (Health, String, String)> {
        match env::split_paths(&self.path)
            .map(|directory| directory.join(name))
            .find(|path| path.is_file())
        {
            Some(path) => Ok(path),
            None => missing(
                format!("{name} is not in PATH"),
                format!("apt-get install {package}"),
            ),
        }
    }

    /// What a program prints; an error says in words why it did not.
    async fn run(&self, name: &str, args: &[&str]) -> Result<String, String> {
        let Ok(program) = self.program(name, name) else {
            return Err(format!("{name} is not in PATH"));
        };
        ask(name, &program, args).await
    }
}

async fn ask(name: &str, program: &Path, args: &[&str]) -> Result<String, String> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).kill_on_drop(true);
    match tokio::time::timeout(PROGRAM_LIMIT, command.output()).await {
        Ok(Ok(output)) if output.status.success() => {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        }
        Ok(Ok(output)) => {
            let stderr = String::from_utf8_lossy(&output.stderr);
            Err(format!("{name} {}: {}", args.join(" "), stderr.trim()))
        }
        Ok(Err(error)) => Err(format!("{name} cannot be run: {error}")),
        Err(_) => Err(format!(
            "{name} did not answer within {} s",
            PROGRAM_LIMIT.as_secs()
        )),
    }
}

fn display(path: PathBuf) -> String {
    path.display().to_string()
}

fn enough_memory(available: Option<u64>, source: &str) -> Look {
    match available {
        None => warning(
            format!("{source} does not tell how much memory is free"),
            "look for it by hand",
        ),
        Some(mib) if mib < MEMORY_MIN_MIB => missing(
            format!("{mib} MiB of memory are free for domains"),
            format!(
                "a domain needs {MEMORY_MIN_MIB} MiB: end something, or give dom0 less with dom0_mem="
            ),
        ),
        Some(mib) => Ok(format!("{mib} MiB free for domains")),
    }
}

/// A field of `xl info`.
fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

fn xen_memory(info: &Result<String, String>) -> Look {
    match info {
        Ok(info) => enough_memory(
            field(info, "free_memory").and_then(|text| text.parse().ok()),
            "xl info",
        ),
        Err(why) => missing(
            why.as_str(),
            "apt-get install xen-utils-common; as root in dom0: xl info",
        ),
    }
}

fn dom0_memory(info: &Result<String, String>) -> Look {
    let Ok(info) = info else {
        return warning("unknown: xl info does not answer", "see memory");
    };
    match field(info, "xen_commandline") {
        Some(line)
            if line
                .split_whitespace()
                .any(|word| word.starts_with("dom0_mem=")) =>
        {
            Ok("dom0 has a fixed share of the memory".into())
        }
        _ => warning(
            "dom0 has all memory until a domain needs some: starts are slow and can fail",
            "put GRUB_CMDLINE_XEN_DEFAULT=\"dom0_mem=2048M,max:2048M\" into /etc/default/grub, run update-grub, \
             set autoballoon=\"off\" in /etc/xen/xl.conf, and boot",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A machine made of files.
    struct Fake {
        dir: tempfile::TempDir,
        sockets: Vec<UnixListener>,
    }

    impl Fake {
        fn new() -> Fake {
            let dir = tempfile::tempdir().unwrap();
            Fake {
                dir,
                sockets: vec![],
            }
        }

        fn file(&self, path: &str, text: &str) -> &Fake {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            self
        }

        fn program(&self, name: &str, script: &str) -> &Fake {
            let path = format!("bin/{name}");
            self.file(&path, &format!("#!/bin/sh\n{script}\n"));
            let path = self.dir.path().join(path);
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
            self
        }

        fn socket(&mut self, path: &str) {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            self.sockets.push(UnixListener::bind(path).unwrap());
        }

        fn remove(&self, path: &str) {
            let path = self.dir.path().join(path);
            if path.is_dir() {
                fs::remove_dir_all(path).unwrap();
            } else {
                fs::remove_file(path).unwrap();
            }
        }

        async fn examine(&self, backend: Option<cli::DoctorBackend>) -> Vec<Finding> {
            let machine = Machine {
                root: self.dir.path().into(),
                path: self.dir.path().join("bin").into(),
                images: self.dir.path().join("images"),
                bridge: "xenbr0".into(),
                programs: Some(self.dir.path().join("bin")),
            };
            machine.examine(backend).await
        }
    }

    fn xen_info(free: u64, line: &str) -> String {
        format!("echo 'free_memory            : {free}'; echo 'xen_commandline        : {line}'")
    }

    /// An `nft` whose table has everything and, in place of its last set, this one.
    fn nft_lists(last: &str) -> String {
        let object = |kind, name| format!(r#"{{"{kind}": {{"name": "{name}"}}}}"#);
        let sets = ["pairs", "macs", "addresses", last].map(|name| object("set", name));
        let chains = ["source", "forward", "input"].map(|name| object("chain", name));
        let all = [&sets[..], &chains[..]].concat().join(", ");
        format!("echo '{{\"nftables\": [{all}]}}'")
    }

    /// A dom0 that lacks nothing.
    fn dom0() -> Fake {
        let mut fake = Fake::new();
        fake.file("sys/hypervisor/type", "xen\n")
            .file("sys/hypervisor/version/major", "4\n")
            .file("sys/hypervisor/version/minor", "17\n")
            .file("sys/hypervisor/version/extra", ".7\n")
            .file("proc/xen/capabilities", "control_d\n")
            .file("sys/bus/xen-backend/drivers/vif/module", "")
            .file("sys/bus/xen-backend/drivers/vbd/module", "")
            .file("sys/class/net/xenbr0/bridge/bridge_id", "")
            .file(
                "usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_libxl.so",
                "",
            )
            .file(
                "proc/net/if_inet6",
                "fd000000000000000000000000000001 03 40 00 80   xenbr0\n",
            )
            .file("images/kernel/vmlinux", "")
            .file("images/base/initramfs.cpio", "")
            .file("var/lib/x", "")
            .program("xl", &xen_info(2000, "dom0_mem=768M console=com1"))
            .program("nft", &nft_lists("targets"))
            .program("qemu-img", "")
            .program("ssh", "");
        for device in ["evtchn", "gntdev", "gntalloc", "privcmd", "xenbus"] {
            fake.file(&format!("dev/xen/{device}"), "");
        }
        fake.socket("run/xenstored/socket");
        fake.socket("run/libvirt/libvirt-sock");
        fake
    }

    fn ill(findings: &[Finding]) -> Vec<&Finding> {
        // The disk is this machine's own.
        let others = findings.iter().filter(|finding| finding.check != "disk");
        others
            .filter(|finding| finding.health != Health::Ok)
            .collect()
    }

    #[tokio::test]
    async fn a_healthy_dom0_lacks_nothing_and_is_recognised() {
        let findings = dom0().examine(None).await;
        assert!(ill(&findings).is_empty(), "{findings:#?}");
        assert_eq!(findings[0].found, "Xen 4.17.7");
        assert!(
            findings
                .iter()
                .all(|finding| finding.remedy.is_none() || finding.check == "disk")
        );
    }

    #[tokio::test]
    async fn each_thing_that_is_missing_is_named_with_its_remedy() {
        let cases = [
            (
                "sys/hypervisor/type",
                "xen",
                "apt-get install xen-system-amd64",
            ),
            (
                "proc/xen/capabilities",
                "dom0",
                "mount -t xenfs xenfs /proc/xen",
            ),
            ("dev/xen/gntdev", "devices", "modprobe -a xen-gntdev"),
            (
                "sys/bus/xen-backend/drivers/vif",
                "back-ends",
                "modprobe -a xen-netback",
            ),
            (
                "run/xenstored/socket",
                "xenstore",
                "systemctl start xenstored",
            ),
            (
                "run/libvirt/libvirt-sock",
                "libvirt",
                "systemctl start libvirtd",
            ),
            (
                "usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_libxl.so",
                "libxl driver",
                "libvirt-daemon-driver-xen",
            ),
            (
                "sys/class/net/xenbr0",
                "bridge",
                "ip link add xenbr0 type bridge",
            ),
            ("bin/nft", "firewall", "xen-configs/dom0/install"),
            ("bin/xl", "memory", "apt-get install xen-utils-common"),
            ("bin/qemu-img", "qemu-img", "apt-get install qemu-utils"),
            ("bin/ssh", "ssh", "apt-get install openssh-client"),
            ("images/base/initramfs.cpio", "image base", "make images"),
        ];
        for (path, check, remedy) in cases {
            let fake = dom0();
            fake.remove(path);
            let findings = fake.examine(Some(cli::DoctorBackend::Xen)).await;
            let finding = ill(&findings)[0];
            assert_eq!(
                (finding.check, finding.health),
                (check, Health::Missing),
                "{path}"
            );
            let said = finding.remedy.as_ref().unwrap();
            assert!(said.contains(remedy), "{path}: {said}");
        }
    }

    #[tokio::test]
    async fn rules_of_an_earlier_release_are_named() {
        let fake = dom0();
        fake.program("nft", &nft_lists("others"));
        let findings = fake.examine(None).await;
        let found: Vec<_> = ill(&findings).iter().map(|f| f.found.as_str()).collect();
        assert_eq!(found, ["not there: set targets of table bridge xenbee"]);
    }

    #[tokio::test]
    async fn what_only_hinders_is_a_warning() {
        let fake = dom0();
        fake.file("sys/hypervisor/version/minor", "11\n")
            .file(
                "proc/net/if_inet6",
                "fe80000000000000000000000000000a 03 40 20 80   xenbr0\n",
            )
            .program("xl", &xen_info(2000, "console=com1"));
        let findings = fake.examine(None).await;
        let checks: Vec<_> = ill(&findings).iter().map(|f| (f.check, f.health)).collect();
        let expected = ["xen", "bridge", "dom0 memory"].map(|check| (check, Health::Warning));
        assert_eq!(checks, expected);
    }

    #[tokio::test]
    async fn too_little_memory_and_a_guest_domain_are_named() {
        let fake = dom0();
        fake.program("xl", &xen_info(100, "dom0_mem=768M"))
            .file("proc/xen/capabilities", "\n");
        let findings = fake.examine(None).await;
        let found: Vec<_> = ill(&findings).iter().map(|f| f.found.as_str()).collect();
        assert_eq!(
            found,
            [
                "this is a guest domain, not the control domain",
                "100 MiB of memory are free for domains"
            ]
        );
    }

    #[tokio::test]
    async fn without_xen_the_qemu_back_end_is_looked_at() {
        let fake = Fake::new();
        fake.file("images/kernel/vmlinux", "")
            .file("images/base/initramfs.cpio", "")
            .file("dev/kvm", "")
            .file("proc/meminfo", "MemAvailable:    8000000 kB\n")
            .file("var/lib/x", "")
            .program("qemu-img", "")
            .program("ssh", "")
            .program(
                "cage",
                r#"echo '{"findings": [{"part": "seccomp", "holds": true, "found": "on"}]}'"#,
            )
            .program(
                "qemu-system-x86_64",
                "echo 'QEMU emulator version 6.1.0 (Debian)'",
            );
        let findings = fake.examine(None).await;
        let checks: Vec<_> = ill(&findings).iter().map(|f| (f.check, f.health)).collect();
        assert_eq!(checks, [("qemu", Health::Warning)], "{findings:#?}");
        fake.program(
            "qemu-system-x86_64",
            "echo 'QEMU emulator version 7.2.22 (Debian)'",
        );
        let findings = fake.examine(None).await;
        assert!(ill(&findings).is_empty(), "{findings:#?}");
        let cage = |holds: bool| {
            let report = format!(
                r#"{{"findings": [{{"part": "seccomp", "holds": true, "found": "on"}},
                {{"part": "landlock", "holds": {holds}, "found": "version 3"}}]}}"#
            );
            format!("[ \"$1\" = --check ] && echo '{report}'")
        };
        fake.program("cage", &cage(false));
        let findings = fake.examine(None).await;
        let found: Vec<_> = ill(&findings)
            .iter()
            .map(|f| (f.check, f.health, f.found.as_str()))
            .collect();
        let gaps = "seccomp (on); gaps: landlock (version 3)";
        assert_eq!(found, [("cage", Health::Warning, gaps)]);
        for (script, said) in [
            ("exit 1", "cage --check: "),
            ("echo nothing", "cage --check says what is no report"),
        ] {
            fake.program("cage", script);
            let findings = fake.examine(None).await;
            assert_eq!(ill(&findings)[0].found, said);
        }
        fake.remove("bin/cage");
        let findings = fake.examine(None).await;
        assert_eq!(
            ill(&findings)[0].found,
            "the program cage is not beside xbe"
        );
        fake.remove("bin/qemu-system-x86_64");
        let findings = fake.examine(None).await;
        assert_eq!(ill(&findings)[0].found, "qemu-system-x86_64 is not in PATH");
    }
}
