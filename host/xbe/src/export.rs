//! `export`: a domain as Xen's own tools take it.

use xbee_api::client::Client;
use xbee_api::{ExportForm, SubmitRequest};

use crate::cli;
use crate::error::Error;
use crate::files::Files;
use crate::run;
use crate::term;

/// `export`.
pub async fn export(client: &Client, args: &cli::Export) -> Result<u8, Error> {
    let form = if args.form.xl {
        ExportForm::Xl
    } else {
        ExportForm::Libvirt
    };
    let exported = match args.what.to_str() {
        // What has neither of them is a task's id, or no id at all, which is then said.
        Some(task) if task != "-" && !task.contains(['.', '/']) => {
            client.export_task(task, form).await?
        }
        _ => {
            let mut request = SubmitRequest {
                jsdl: run::read_text(&args.what)?,
                lenient: args.lenient,
                ..SubmitRequest::default()
            };
            Files::of(client, &request).announce(&mut request);
            client.export(&request, form).await?
        }
    };
    for command in &exported.prepare {
        term::note(format_args!("to be made first: {}", term::clean(command)));
    }
    term::out(term::clean(exported.text.trim_end()))?;
    Ok(0)
}
