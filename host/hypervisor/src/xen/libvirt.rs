//! libvirt's client library: one connection, made anew when it is lost, and what happens to domains.
//!
//! Calls block and run on threads for that. Nothing is polled: libvirt's event loop has a thread of
//! its own and says which domain to look at.

use std::ffi::{CString, c_int, c_void};
use std::fmt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use quick_xml::events::Event;
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{ErrorDomain, ErrorNumber};
use virt_sys as sys;

use crate::domain::{DomainId, DomainStats};
use crate::error::Error;
use crate::work;

/// A connection over which nothing came for so long is asked for a sign of life, so many times.
const KEEP_ALIVE_S: i32 = 5;
const KEEP_ALIVE_MAX: u32 = 6;

/// Pause after the event loop failed, which it does only for want of memory or descriptors.
const LOOP_PAUSE: Duration = Duration::from_secs(1);

/// What libvirt says, unasked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Notice {
    /// Something happened to a domain.
    Domain(DomainId),
    /// A domain stopped; `true`: its guest had ended by itself, in an orderly way or for a reset.
    Stopped(DomainId, bool),
    /// The connection is lost.
    Lost,
}

/// What a domain is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    Running,
    Paused,
    /// Its guest switched itself off; it is preserved.
    Off,
    /// Its guest asked for a reset, and it is being destroyed or has been.
    Reset,
    /// Its guest's kernel panicked; it is preserved.
    Crashed,
    /// There is no such domain.
    Gone,
}

type Observer = dyn Fn(Notice) + Send + Sync;

/// A connection to libvirt's daemon.
pub(crate) struct Libvirt {
    uri: String,
    observer: Arc<Observer>,
    session: Mutex<Option<Arc<Session>>>,
}

impl fmt::Debug for Libvirt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Libvirt").field("uri", &self.uri).finish()
    }
}

impl Libvirt {
    /// `observer` is called on the event loop's thread and must not block.
    pub(crate) fn new(uri: String, observer: impl Fn(Notice) + Send + Sync + 'static) -> Self {
        Self {
            uri,
            observer: Arc::new(observer),
            session: Mutex::default(),
        }
    }

    /// Connects, unless it is connected.
    pub(crate) async fn connect(self: &Arc<Self>) -> Result<(), Error> {
        let this = Arc::clone(self);
        work::blocking(move || this.session().map(drop)).await
    }

    /// Ends the connection.
    pub(crate) fn disconnect(&self) {
        let session = self.lock().take();
        // It waits for the daemon, which a caller in an asynchronous context must not.
        std::thread::spawn(move || drop(session));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Session>>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn session(&self) -> Result<Arc<Session>, Error> {
        let mut session = self.lock();
        if let Some(session) = &*session
            && session.connect.is_alive().unwrap_or(false)
        {
            return Ok(Arc::clone(session));
        }
        let new = Arc::new(Session::open(&self.uri, &self.observer)?);
        *session = Some(Arc::clone(&new));
        Ok(new)
    }

    async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        call: impl FnOnce(&Connect) -> Result<T, virt::error::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let this = Arc::clone(self);
        work::blocking(move || {
            let session = this.session()?;
            call(&session.connect).map_err(|error| broken(&error))
        })
        .await
    }

    /// Starts a domain that goes when it ends.
    pub(crate) async fn create(self: &Arc<Self>, xml: String) -> Result<(), Error> {
        self.call(move |connect| Domain::create_xml(connect, &xml, 0).map(drop))
            .await
    }

    pub(crate) async fn see(self: &Arc<Self>, id: DomainId) -> Result<Seen, Error> {
        self.call(move |connect| {
            let none = |error: &virt::error::Error| error.code() == ErrorNumber::NoDomain;
            let domain = match Domain::lookup_by_uuid(connect, id) {
                Ok(domain) => domain,
                Err(error) if none(&error) => return Ok(Seen::Gone),
                Err(error) => return Err(error),
            };
            let seen = match domain.get_state() {
                Ok((state, reason)) => seen(state, reason),
                Err(error) if none(&error) => return Ok(Seen::Gone),
                Err(error) => return Err(error),
            };
            match seen {
                // Both are called a shutdown, but one that was reset is being destroyed: a job is
                // under way, or the domain is no more.
                Seen::Off => match domain.get_job_info() {
                    Ok(job) if job.r#type == sys::VIR_DOMAIN_JOB_NONE as i32 => Ok(Seen::Off),
                    Ok(_) => Ok(Seen::Reset),
                    Err(error) if none(&error) => Ok(Seen::Reset),
                    Err(error) => Err(error),
                },
                // libvirt's own state is behind; this asks Xen, which may have it no more.
                Seen::Running | Seen::Paused => match domain.get_info() {
                    Ok(_) => Ok(seen),
                    Err(error) if error.code() == ErrorNumber::InternalError || none(&error) => {
                        Ok(Seen::Gone)
                    }
                    Err(error) => Err(error),
                },
                Seen::Reset | Seen::Crashed | Seen::Gone => Ok(seen),
            }
        })
        .await
    }

    /// Ends a domain; `false`: there was none (any more).
    pub(crate) async fn destroy(self: &Arc<Self>, id: DomainId) -> Result<bool, Error> {
        self.call(move |connect| {
            let destroyed = Domain::lookup_by_uuid(connect, id).and_then(|domain| domain.destroy());
            match destroyed {
                Ok(()) => Ok(true),
                // The second: it ended while this call waited for another one.
                Err(error)
                    if matches!(
                        error.code(),
                        ErrorNumber::NoDomain | ErrorNumber::OperationInvalid
                    ) =>
                {
                    Ok(false)
                }
                Err(error) => Err(error),
            }
        })
        .await
    }

    pub(crate) async fn pause(self: &Arc<Self>, id: DomainId) -> Result<(), Error> {
        self.call(move |connect| Domain::lookup_by_uuid(connect, id)?.suspend().map(drop))
            .await
    }

    pub(crate) async fn resume(self: &Arc<Self>, id: DomainId) -> Result<(), Error> {
        self.call(move |connect| Domain::lookup_by_uuid(connect, id)?.resume().map(drop))
            .await
    }

    /// Has the guest save itself to a file that is there already, and go. It goes on where that fails.
    pub(crate) async fn save(self: &Arc<Self>, id: DomainId, file: String) -> Result<(), Error> {
        self.call(move |connect| {
            let domain = Domain::lookup_by_uuid(connect, id)?;
            let file = CString::new(file).unwrap_or_default();
            // SAFETY: the domain and the path are valid during the call; no description is given.
            let saved = unsafe {
                sys::virDomainSaveFlags(domain.as_ptr(), file.as_ptr(), std::ptr::null(), 0)
            };
            match saved {
                0 => Ok(()),
                _ => Err(virt::error::Error::last_error()),
            }
        })
        .await
    }

    /// Makes the domain of a file again, halted.
    pub(crate) async fn restore(self: &Arc<Self>, file: String) -> Result<(), Error> {
        self.call(move |connect| {
            Domain::domain_restore_flags(connect, &file, None, sys::VIR_DOMAIN_SAVE_PAUSED)
        })
        .await
    }

    pub(crate) async fn attach(self: &Arc<Self>, id: DomainId, xml: String) -> Result<(), Error> {
        self.call(move |connect| {
            Domain::lookup_by_uuid(connect, id)?
                .attach_device_flags(&xml, sys::VIR_DOMAIN_AFFECT_LIVE)
                .map(drop)
        })
        .await
    }

    /// Takes a device away, if it is there.
    pub(crate) async fn detach(self: &Arc<Self>, id: DomainId, xml: String) -> Result<(), Error> {
        self.call(move |connect| {
            let domain = Domain::lookup_by_uuid(connect, id)?;
            match domain.detach_device_flags(&xml, sys::VIR_DOMAIN_AFFECT_LIVE) {
                // libvirt says so in more than one way.
                Err(error) if !has_device(&domain.get_xml_desc(0)?, &xml) => {
                    tracing::debug!(domain = %id, error = error.message(), "no such device");
                    Ok(())
                }
                result => result.map(drop),
            }
        })
        .await
    }

    /// What libvirt says a running domain has.
    pub(crate) async fn devices(self: &Arc<Self>, id: DomainId) -> Result<Devices, Error> {
        self.call(move |connect| {
            let xml = Domain::lookup_by_uuid(connect, id)?.get_xml_desc(0)?;
            Ok(devices(&xml))
        })
        .await
    }

    pub(crate) async fn set_memory(self: &Arc<Self>, id: DomainId, kib: u64) -> Result<(), Error> {
        self.call(move |connect| {
            Domain::lookup_by_uuid(connect, id)?
                .set_memory_flags(kib, sys::VIR_DOMAIN_MEM_LIVE)
                .map(drop)
        })
        .await
    }

    /// Waits for what is under way with a domain; `false`: longer than libvirt lets one wait.
    pub(crate) async fn wait(self: &Arc<Self>, id: DomainId) -> Result<bool, Error> {
        self.call(move |connect| {
            // Any question that is asked in turn.
            let asked =
                Domain::lookup_by_uuid(connect, id).and_then(|domain| domain.memory_stats(0));
            match asked {
                Err(error) if error.code() == ErrorNumber::OperationTimeout => Ok(false),
                Err(error) if error.domain() == ErrorDomain::Rpc => Err(error),
                // A domain that is not running has no memory to speak of, but is not busy.
                _ => Ok(true),
            }
        })
        .await
    }

    /// Asks the guest's kernel to switch the machine off, through xenstore. `acpi`: or, if it does
    /// not look there, by the power button.
    pub(crate) async fn shut_down(self: &Arc<Self>, id: DomainId, acpi: bool) -> Result<(), Error> {
        let mut ways = sys::VIR_DOMAIN_SHUTDOWN_PARAVIRT;
        if acpi {
            ways |= sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN;
        }
        self.call(move |connect| {
            Domain::lookup_by_uuid(connect, id)?
                .shutdown_flags(ways)
                .map(drop)
        })
        .await
    }

    pub(crate) async fn stats(self: &Arc<Self>, id: DomainId) -> Result<DomainStats, Error> {
        self.call(move |connect| {
            let info = Domain::lookup_by_uuid(connect, id)?.get_info()?;
            Ok(DomainStats {
                cpu_ms: info.cpu_time / 1_000_000,
                memory_bytes: info.memory << 10,
            })
        })
        .await
    }

    /// Xen's number of a running domain.
    pub(crate) async fn domid(self: &Arc<Self>, id: DomainId) -> Result<Option<u32>, Error> {
        self.call(move |connect| match Domain::lookup_by_uuid(connect, id) {
            Ok(domain) => Ok(domain.get_id()),
            Err(error) if error.code() == ErrorNumber::NoDomain => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }

    /// The terminal that a domain's console is read from.
    pub(crate) async fn console(self: &Arc<Self>, id: DomainId) -> Result<Option<String>, Error> {
        self.call(move |connect| {
            let xml = Domain::lookup_by_uuid(connect, id)?.get_xml_desc(0)?;
            Ok(console_terminal(&xml))
        })
        .await
    }

    /// Memory of the machine and what of it is free, in bytes, and its processors.
    pub(crate) async fn host(self: &Arc<Self>) -> Result<(u64, u64, u32), Error> {
        self.call(|connect| {
            let info = connect.get_node_info()?;
            Ok((info.memory << 10, connect.get_free_memory()?, info.cpus))
        })
        .await
    }
}

/// A connection with its subscriptions.
struct Session {
    connect: Connect,
    events: c_int,
}

impl Session {
    fn open(uri: &str, observer: &Arc<Observer>) -> Result<Self, Error> {
        event_loop()?;
        let connect = Connect::open(Some(uri)).map_err(|error| Error::HypervisorBroken {
            detail: format!(
                "libvirt at {uri}: {}: is libvirtd running, with its driver for Xen? \
                 (Debian: apt-get install libvirt-daemon-system libvirt-daemon-driver-xen)",
                error.message()
            ),
        })?;
        // Without it a daemon that hangs is noticed by nobody; one that is too old for it is
        // none of those with a driver for libxl.
        connect
            .set_keep_alive(KEEP_ALIVE_S, KEEP_ALIVE_MAX)
            .map_err(|error| broken(&error))?;
        let opaque = || Box::into_raw(Box::new(Arc::clone(observer))).cast::<c_void>();
        let callback: unsafe extern "C" fn(
            sys::virConnectPtr,
            sys::virDomainPtr,
            c_int,
            c_int,
            *mut c_void,
        ) -> c_int = on_lifecycle;
        let data = opaque();
        // SAFETY: the connection is open. For this event libvirt calls a function of exactly this
        // type, whatever the parameter's type says (virConnectDomainEventRegisterAny). `data` is
        // a boxed `Arc<Observer>`, which `on_free` frees when nothing calls any more.
        let events = unsafe {
            sys::virConnectDomainEventRegisterAny(
                connect.as_ptr(),
                std::ptr::null_mut(),
                sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE as c_int,
                std::mem::transmute::<
                    unsafe extern "C" fn(
                        sys::virConnectPtr,
                        sys::virDomainPtr,
                        c_int,
                        c_int,
                        *mut c_void,
                    ) -> c_int,
                    sys::virConnectDomainEventGenericCallback,
                >(callback),
                data,
                Some(on_free),
            )
        };
        if events < 0 {
            free(data);
            return Err(broken(&virt::error::Error::last_error()));
        }
        let data = opaque();
        // SAFETY: as above, with the type that the parameter has.
        let registered = unsafe {
            sys::virConnectRegisterCloseCallback(
                connect.as_ptr(),
                Some(on_close),
                data,
                Some(on_free),
            )
        };
        let session = Self { connect, events };
        if registered < 0 {
            free(data);
            return Err(broken(&virt::error::Error::last_error()));
        }
        Ok(session)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: the connection is open until `self.connect` is dropped, after this. Failures
        // mean that the daemon has gone, and the subscriptions with it.
        unsafe {
            sys::virConnectUnregisterCloseCallback(self.connect.as_ptr(), Some(on_close));
            sys::virConnectDomainEventDeregisterAny(self.connect.as_ptr(), self.events);
        }
    }
}

/// Frees what a failed subscription would have owned.
fn free(data: *mut c_void) {
    // SAFETY: made by `opaque` above and given to nobody.
    unsafe { on_free(data) }
}

unsafe extern "C" fn on_free(data: *mut c_void) {
    // SAFETY: made by `Box::into_raw` from this type, and freed once.
    drop(unsafe { Box::from_raw(data.cast::<Arc<Observer>>()) });
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    data: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes on what was subscribed with, which lives until `on_free`.
    let observer = unsafe { &*data.cast::<Arc<Observer>>() };
    let mut id = [0; sys::VIR_UUID_BUFLEN as usize];
    // SAFETY: libvirt's domain is valid during the call, and the buffer has the size it asks for.
    if unsafe { sys::virDomainGetUUID(domain, id.as_mut_ptr()) } == 0 {
        let id = Uuid::from_bytes(id);
        observer(if event == sys::VIR_DOMAIN_EVENT_STOPPED as c_int {
            let by_itself = detail == sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN as c_int;
            Notice::Stopped(id, by_itself)
        } else {
            Notice::Domain(id)
        });
    }
    0
}

unsafe extern "C" fn on_close(_: sys::virConnectPtr, _reason: c_int, data: *mut c_void) {
    // SAFETY: as in `on_lifecycle`.
    let observer = unsafe { &*data.cast::<Arc<Observer>>() };
    observer(Notice::Lost);
}

/// Starts libvirt's event loop, once in this process.
fn event_loop() -> Result<(), Error> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    let start = || {
        virt::error::clear_error_callback();
        virt::event::event_register_default_impl().map_err(|error| error.message().to_owned())?;
        let run = || loop {
            if let Err(error) = virt::event::event_run_default_impl() {
                tracing::error!(error = error.message(), "libvirt's event loop");
                std::thread::sleep(LOOP_PAUSE);
            }
        };
        let thread = std::thread::Builder::new().name("libvirt-events".to_owned());
        thread.spawn(run).map_err(|error| error.to_string())?;
        Ok(())
    };
    STARTED
        .get_or_init(start)
        .clone()
        .map_err(|detail| Error::HypervisorBroken { detail })
}

fn broken(error: &virt::error::Error) -> Error {
    Error::HypervisorBroken {
        detail: format!("libvirt: {}", error.message()),
    }
}

fn seen(state: sys::virDomainState, reason: i32) -> Seen {
    match state {
        sys::VIR_DOMAIN_PAUSED => Seen::Paused,
        sys::VIR_DOMAIN_CRASHED => Seen::Crashed,
        sys::VIR_DOMAIN_SHUTOFF if reason == sys::VIR_DOMAIN_SHUTOFF_CRASHED as i32 => {
            Seen::Crashed
        }
        sys::VIR_DOMAIN_SHUTOFF if reason == sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN as i32 => Seen::Off,
        // A domain that was destroyed, just before it is forgotten.
        sys::VIR_DOMAIN_SHUTOFF => Seen::Gone,
        _ => Seen::Running,
    }
}

/// Disks' targets and interfaces' hardware addresses.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Devices {
    pub(crate) disks: Vec<String>,
    pub(crate) macs: Vec<String>,
}

/// The devices of a domain's description, or the one of its own.
fn devices(xml: &str) -> Devices {
    let mut devices = Devices::default();
    let mut reader = quick_xml::Reader::from_str(xml);
    while let Ok(event) = reader.read_event() {
        let (Event::Start(tag) | Event::Empty(tag)) = &event else {
            if event == Event::Eof {
                break;
            }
            continue;
        };
        let (name, list) = match tag.name().as_ref() {
            "target" => ("dev", &mut devices.disks),
            "mac" => ("address", &mut devices.macs),
            _ => continue,
        };
        if let Ok(Some(attribute)) = tag.try_get_attribute(name) {
            list.push(attribute.value.into_owned());
        }
    }
    devices
}

/// Whether a domain has the device that is described.
fn has_device(domain: &str, device: &str) -> bool {
    let (there, asked) = (devices(domain), devices(device));
    asked.disks.iter().all(|disk| there.disks.contains(disk))
        && asked.macs.iter().all(|mac| there.macs.contains(mac))
}

/// The attribute `tty` of the first console.
fn console_terminal(xml: &str) -> Option<String> {
    let mut reader = quick_xml::Reader::from_str(xml);
    loop {
        match reader.read_event().ok()? {
            Event::Eof => return None,
            Event::Start(tag) | Event::Empty(tag) if tag.name().as_ref() == "console" => {
                let attribute = tag.try_get_attribute("tty").ok()??;
                return Some(attribute.value.into_owned());
            }
            _ => {}
        }
    }
}
