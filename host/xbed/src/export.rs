//! A domain as its hypervisor's own tools take it: that of a task, and the one a job would get.

use uuid::Uuid;
use xbee_api::{DomainExport, ExportForm};
use xbee_hypervisor::{DescriptionForm, DomainSpec};

use crate::command::CommandError;
use crate::host::Host;
use crate::plan::{Boot, Plan};
use crate::steps::{self, BootFiles, Identity};
use crate::store::Owner;
use crate::task::TaskHandle;
use crate::translate::PlanError;

/// Numbers from here on are those of domains that are only described: no task gets there.
const FIRST_DESCRIBED: u32 = 1 << 31;

/// The domain that the task has.
pub async fn of_task(
    host: &Host,
    task: &TaskHandle,
    form: ExportForm,
) -> Result<DomainExport, CommandError> {
    let id = task.record.id;
    let domains = host.hypervisor.list().await.map_err(CommandError::Export)?;
    if !domains.iter().any(|domain| domain.id == id) {
        return Err(CommandError::NoDomain(id));
    }
    // A task with a domain has been staged in.
    let boot = BootFiles::load(&task.spool).map_err(|_| CommandError::NoDomain(id))?;
    let spec = steps::domain(host, Identity::of_task(task), task.plan(), &boot);
    describe(host, &spec, form)
}

/// The domain that the job would get, under an identity of its own.
pub fn of_job(
    host: &Host,
    owner: Owner,
    plan: &Plan,
    form: ExportForm,
) -> Result<DomainExport, CommandError> {
    let Boot::Store { name } = &plan.boot else {
        return Err(CommandError::NotFetched);
    };
    let image = host.images.get(name).map_err(PlanError::from)?;
    let id = Uuid::new_v4();
    let [a, b, c, d, ..] = id.into_bytes();
    let identity = Identity {
        id,
        owner,
        // The highest number is nobody's.
        number: (u32::from_be_bytes([a, b, c, d]) | FIRST_DESCRIBED).min(u32::MAX - 1),
    };
    let spec = steps::domain(host, identity, plan, &image.into());
    describe(host, &spec, form)
}

fn describe(
    host: &Host,
    spec: &DomainSpec,
    form: ExportForm,
) -> Result<DomainExport, CommandError> {
    let form = match form {
        ExportForm::Xl => DescriptionForm::Xl,
        ExportForm::Libvirt => DescriptionForm::Libvirt,
    };
    let described = host.hypervisor.describe(spec, form);
    let described = described.map_err(CommandError::Export)?;
    Ok(DomainExport {
        text: described.text,
        prepare: described.prepare,
    })
}
