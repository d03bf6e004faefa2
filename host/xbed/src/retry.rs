//! Which failures are worth another try, and when.

use std::time::Duration;

use xbee_engine::Failure;

use crate::task::StepContext;
use crate::view;

/// Failures that may have passed when it is tried again: of the network, of servers, of what others held on this host.
/// All else would fail in the same way.
const MAY_PASS: [&str; 13] = [
    "connect",
    "transfer",
    "timeout",
    "changed",
    "ftp",
    "disk-full",
    "no-memory-now",
    "start-failed",
    "start-interrupted",
    "hypervisor-control",
    "agent-never-came",
    "agent-silent",
    "domain-lost",
];
/// Longest wait between two tries.
const LONGEST: Duration = Duration::from_secs(3600);

/// When a task whose step failed shall be tried again, milliseconds since the Unix epoch.
pub fn at_ms(context: &StepContext, failure: &Failure) -> Option<u64> {
    let host = &context.host;
    let wanted = context.task.job()?.request.retries;
    let allowed = wanted
        .unwrap_or(host.config.retries)
        .min(host.config.retries_max);
    let done = context.task.state().retries;
    let again = done < allowed && MAY_PASS.contains(&failure.code.as_str());
    again.then(|| view::now_ms().saturating_add(delay_ms(host.config.retry_delay, done)))
}

/// Twice as long each time.
fn delay_ms(first: Duration, done: u32) -> u64 {
    let delay = first.saturating_mul(1u32.checked_shl(done).unwrap_or(u32::MAX));
    delay
        .min(LONGEST)
        .as_millis()
        .try_into()
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_wait_is_twice_the_one_before_up_to_an_hour() {
        let first = Duration::from_secs(10);
        let delays: Vec<u64> = [0, 1, 2, 3, 20, 31, 32, 4000]
            .map(|done| delay_ms(first, done) / 1000)
            .into();
        assert_eq!(delays, [10, 20, 40, 80, 3600, 3600, 3600, 3600]);
    }
}
