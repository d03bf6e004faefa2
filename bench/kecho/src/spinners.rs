//! Processes that keep every core awake and get what nobody else wants (SCHED_IDLE).

use std::process::{Child, Command, Stdio};

use crate::system::Result;

pub struct Spinners(Vec<Child>);

impl Spinners {
    pub fn start() -> Result<Spinners> {
        let mut all = Spinners(Vec::new());
        for core in 0..std::thread::available_parallelism()?.get() {
            let child = Command::new("setpriv")
                .args(["--pdeathsig", "KILL", "taskset", "-c", &core.to_string()])
                .args(["chrt", "--idle", "0"])
                .arg(std::env::current_exe()?)
                .arg("spin")
                .stdin(Stdio::null())
                .spawn()?;
            all.0.push(child);
        }
        Ok(all)
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What such a process does.
pub fn spin() -> ! {
    loop {
        std::hint::spin_loop();
    }
}
