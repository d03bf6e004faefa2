//! Takes as much memory, or as many threads, as it is told to, and says how much it has.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

const PAGE_BYTES: usize = 4096;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let many = args.get(1).and_then(|many| many.parse::<usize>().ok());
    match (args.first().map(String::as_str), many) {
        (Some("memory"), Some(bytes)) => {
            let mut memory = vec![0_u8; bytes];
            memory.iter_mut().step_by(PAGE_BYTES).for_each(|b| *b = 1);
            println!(
                "{}",
                memory.iter().filter(|b| **b == 1).count() * PAGE_BYTES
            );
        }
        (Some("threads"), Some(count)) => {
            let sleep = || thread::sleep(Duration::from_secs(600));
            let made = (0..count).take_while(|_| thread::Builder::new().spawn(sleep).is_ok());
            println!("{}", made.count());
        }
        _ => return ExitCode::from(2),
    }
    // Without waiting for the threads.
    std::process::exit(0)
}
