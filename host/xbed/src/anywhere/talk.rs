use super::*;
use xbee_kecho::{EventType, Value};
#[derive(Debug, thiserror::Error)]
#[error("stub")]
pub struct StartError;
pub struct Talk;
impl Talk {
    pub fn say(
        &self,
        _k: &EventType,
        _a: (&'static str, Value),
        _p: &[u8],
    ) -> Result<(), StartError> {
        Err(StartError)
    }
    pub fn end(&self) {}
}
pub fn start(host: &Arc<Host>, config: Kecho) -> Result<Talk, StartError> {
    let anywhere = Anywhere::new(host, config).map_err(|_| StartError)?;
    host.join(anywhere);
    Ok(Talk)
}
