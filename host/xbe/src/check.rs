//! `check`: are documents valid, and would the host take them?

use std::path::Path;

use serde::Serialize;
use xbee_api::SubmitRequest;
use xbee_api::client::Client;
use xbee_jsdl::limits::{MAX_DIAGNOSTICS, MAX_SWEEP_JOBS};
use xbee_jsdl::sweep::{self, Sweep};
use xbee_jsdl::{Diagnostic, Options};

use crate::cli;
use crate::error::Error;
use crate::exit;
use crate::files::Files;
use crate::run;
use crate::term;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Severity {
    /// The document is invalid.
    Error,
    /// It is valid, but `xbed` does not run it.
    Unsupported,
    /// It is valid, but `xbed` ignores this.
    Warning,
    /// A lenient reading let this pass.
    Forgiven,
    /// The host does not take it.
    NotAccepted,
    /// It is more than one job, all of them valid.
    Sweep,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Finding<'a> {
    file: &'a Path,
    line: Option<u32>,
    column: Option<u32>,
    severity: Severity,
    code: Option<&'static str>,
    message: String,
}

/// `check`.
pub async fn check(args: &cli::Check, client: Option<&Client>) -> Result<u8, Error> {
    let (mut invalid, mut refused) = (false, false);
    for file in &args.files {
        let document = run::read(file)?;
        let findings = findings(&document, args.lenient);
        let is_invalid = findings
            .iter()
            .any(|(severity, _)| *severity == Severity::Error);
        for (severity, diagnostic) in findings {
            let Diagnostic {
                line,
                column,
                code,
                message,
            } = diagnostic;
            let (line, column, code) = (Some(line), Some(column), Some(code));
            report(
                args,
                &Finding {
                    file,
                    line,
                    column,
                    severity,
                    code,
                    message,
                },
            )?;
        }
        invalid |= is_invalid;
        if let (Some(client), false) = (client, is_invalid) {
            refused |= ask(args, client, file, document).await?;
        }
    }
    Ok(match (invalid, refused) {
        (true, _) => exit::INVALID,
        (false, true) => exit::NOT_ACCEPTED,
        (false, false) => 0,
    })
}

/// What there is to say about a document.
fn findings(document: &[u8], lenient: bool) -> Vec<(Severity, Diagnostic)> {
    let all = |severity, diagnostics: Vec<Diagnostic>| {
        diagnostics
            .into_iter()
            .map(move |diagnostic| (severity, diagnostic))
            .collect::<Vec<_>>()
    };
    let options = Options { lenient };
    let forgiven = match xbee_jsdl::verdict_with(document, &options) {
        Ok(forgiven) => forgiven,
        Err(errors) => return all(Severity::Error, errors),
    };
    let read = match sweep::expand(document, &options, MAX_SWEEP_JOBS) {
        Ok(None) => xbee_jsdl::parse(document, &options)
            .map(|parsed| (parsed.forgiven, parsed.warnings, None)),
        Ok(Some(sweep)) => {
            jobs(&sweep).map(|(warnings, valid)| (sweep.forgiven().to_vec(), warnings, Some(valid)))
        }
        Err(errors) => Err(errors),
    };
    match read {
        Ok((forgiven, warnings, valid)) => {
            let mut findings = all(Severity::Forgiven, forgiven);
            findings.extend(all(Severity::Warning, warnings));
            findings.extend(all(Severity::Sweep, valid.into_iter().collect()));
            findings.sort_by_key(|(_, diagnostic)| (diagnostic.line, diagnostic.column));
            findings
        }
        Err(errors) => {
            let mut findings = all(Severity::Forgiven, forgiven);
            findings.extend(all(Severity::Unsupported, errors));
            findings
        }
    }
}

/// Reads all jobs of a sweep: what of them is ignored, each once, and how many there are. The error is
/// what is wrong with the first that is.
fn jobs(sweep: &Sweep) -> Result<(Vec<Diagnostic>, Diagnostic), Vec<Diagnostic>> {
    let mut warnings: Vec<Diagnostic> = Vec::new();
    for member in sweep.jobs() {
        for warning in member?.parsed.warnings {
            if !warnings.contains(&warning) {
                warnings.push(warning);
            }
        }
    }
    warnings.truncate(MAX_DIAGNOSTICS);
    let valid = Diagnostic {
        line: sweep.line(),
        column: sweep.column(),
        code: "sweep",
        message: match sweep.count() {
            1 => "valid (sweep of 1 job)".to_owned(),
            count => format!("valid (sweep of {count} jobs)"),
        },
    };
    Ok((warnings, valid))
}

/// Whether the host refuses the document.
async fn ask(
    args: &cli::Check,
    client: &Client,
    file: &Path,
    document: Vec<u8>,
) -> Result<bool, Error> {
    let jsdl = String::from_utf8(document).map_err(|_| Error::NotUtf8 {
        path: file.to_owned(),
    })?;
    let mut request = SubmitRequest {
        jsdl,
        lenient: args.lenient,
        ..SubmitRequest::default()
    };
    Files::of(client, &request).announce(&mut request);
    let answer = client.check(&request).await?;
    for message in answer.reasons {
        let severity = Severity::NotAccepted;
        let (line, column, code) = (None, None, None);
        report(
            args,
            &Finding {
                file,
                line,
                column,
                severity,
                code,
                message,
            },
        )?;
    }
    Ok(!answer.accepted)
}

fn report(args: &cli::Check, finding: &Finding<'_>) -> Result<(), Error> {
    if args.json.json {
        return term::json(finding);
    }
    let line = finding
        .line
        .map(|line| format!(":{line}"))
        .unwrap_or_default();
    let what = match finding.severity {
        Severity::Error | Severity::Sweep => "",
        Severity::Unsupported => "warning: xbed does not run this: ",
        Severity::Warning => "warning: ",
        Severity::Forgiven => "forgiven: ",
        Severity::NotAccepted => "not accepted: ",
    };
    let message = term::clean_line(&finding.message);
    term::out(format_args!(
        "{}{line}: {what}{message}",
        finding.file.display()
    ))
}
