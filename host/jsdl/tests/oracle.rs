//! Compares the verdict with that of a schema validator on a corpus of documents found in the wild.
//!
//! `XBEE_CORPUS` names a directory with `oracle.tsv`, whose column `jsdl+posix` says `valid`,
//! `invalid` or `-` (not well-formed) for the file in the column `file`.

use std::path::Path;

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

    let mut compared = 0;
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
    }
    println!("{compared} documents compared");
    assert!(compared > 0, "oracle.tsv names no documents");
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}
