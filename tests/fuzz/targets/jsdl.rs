//! A job document from a stranger: any bytes are read in bounded time without a panic, and a document that was
//! understood is written back as one that means the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use xbee_jsdl::{Options, parse, verdict, write};

fuzz_target!(|document: &[u8]| {
    let strict = parse(document, &Options { lenient: false });
    // Either reading says something of a document that it does not take.
    let said = |findings: &Vec<_>| assert!(!findings.is_empty(), "refused without a reason");
    let _ = parse(document, &Options { lenient: true }).inspect_err(said);
    let valid = verdict(document);
    match strict {
        Err(findings) => said(&findings),
        Ok(parsed) => {
            assert!(valid.is_ok(), "understood, and not valid: {valid:?}");
            if let Ok(written) = write(&parsed.job) {
                let again = parse(written.as_bytes(), &Options { lenient: false })
                    .unwrap_or_else(|findings| panic!("{findings:?} in {written}"));
                assert_eq!(again.job, parsed.job);
            }
        }
    }
});
