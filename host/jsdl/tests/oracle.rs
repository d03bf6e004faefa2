//! Compares the verdict with that of a schema validator on a corpus of documents found in the wild.
//!
//! `XBEE_CORPUS` names a directory with `oracle.tsv`, whose column `jsdl+posix` says `valid`,
//! `invalid` or `-` (not well-formed) for the file in the column `file`. Valid sweeps are expanded, too.

use std::path::Path;

use xbee_jsdl::Options;
use xbee_jsdl::limits::MAX_SWEEP_JOBS;
use xbee_jsdl::sweep::expand;

#[test]
fn verdicts_equal_the_schema_validators() {
    let Some(corpus) = std::env::var_os("XBEE_CORPUS") else {
        println!("skipped: XBEE_CORPUS is not set");
        return;
    };
    let corpus = Path::new(&corpus);
    let table = std::fs::read_to_string(corpus.join("oracle.tsv")).expect("oracle.tsv");
    let mut lines = table.lines();
    let header: Vec<&str> = lines.next().expect("header").split('\t').collect();
    let column = |name: &str| {
        header
            .iter()
            .position(|title| *title == name)
            .unwrap_or_else(|| panic!("oracle.tsv has no column {name}"))
    };
    let (file, expected) = (column("file"), column("jsdl+posix"));

    let (mut compared, mut sweeps) = (0, 0);
    let mut differences = Vec::new();
    for line in lines {
        let fields: Vec<&str> = line.split('\t').collect();
        let document = std::fs::read(corpus.join(fields[file])).expect(fields[file]);
        let verdict = xbee_jsdl::verdict(&document);
        compared += 1;
        if verdict.is_ok() != (fields[expected] == "valid") {
            differences.push(format!(
                "{}: {} but {verdict:?}",
                fields[file], fields[expected]
            ));
        }
        if verdict.is_err() {
            continue;
        }
        // What is valid is understood as a sweep, or it is said what of it is not supported. Some documents
        // are templates themselves: their matches fit what a program is yet to put into them.
        let refused = match expand(&document, &Options::default(), MAX_SWEEP_JOBS) {
            Ok(None) => continue,
            Ok(Some(sweep)) => {
                let jobs = sweep.count();
                let start = std::time::Instant::now();
                let made = sweep.jobs().collect::<Result<Vec<_>, _>>();
                println!(
                    "{}: {jobs} jobs, made in {:?}",
                    fields[file],
                    start.elapsed()
                );
                made.err()
            }
            Err(findings) => Some(findings),
        };
        sweeps += 1;
        for finding in refused.into_iter().flatten() {
            println!("{}:{finding}", fields[file]);
            if !finding.code.starts_with("unsupported-")
                && !["sweep-too-large", "match-finds-nothing"].contains(&finding.code)
            {
                differences.push(format!("{}: {finding:?}", fields[file]));
            }
        }
    }
    println!("{compared} documents compared, {sweeps} of them sweeps");
    assert!(compared > 0, "oracle.tsv names no documents");
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}
