//! The work of a plan: what its progress is measured by.

use std::sync::Arc;

use imgtool_core::{Lane, Output, Result};

use super::{Plan, RunOptions};
use crate::layout::PlannedOutput;
use crate::pipeline::{self, Job, Route};
use crate::sinks::OpenSink;
use crate::sources::{self, OpenSource, SelectedDisk};
use crate::survey::SurveyedDevice;
use crate::work::{Gauge, LaneInfo, Part};

impl Plan {
    /// Returns the gauge for the copy.
    pub(super) fn gauge(&self, sinks: &[OpenSink], options: &RunOptions<'_>) -> Gauge {
        let outputs: Vec<Output> = sinks.iter().map(|open| open.output.clone()).collect();
        let written = Box::new(move || outputs.iter().map(Output::written).sum());
        Gauge::new(self.lanes(), self.parts(sinks, options), written)
    }

    fn lanes(&self) -> Vec<LaneInfo> {
        let lane = |disk: &SelectedDisk| LaneInfo {
            name: disk.name.clone(),
            total: (!disk.device.open_ended).then_some(disk.device.size),
        };
        self.selected.iter().map(lane).collect()
    }

    /// Returns the work of each source that is copied.
    fn parts(&self, sinks: &[OpenSink], options: &RunOptions<'_>) -> Vec<Part> {
        let sources = if options.without_content { &[] } else { self.sources.as_slice() };
        let is_verbatim = |output: &PlannedOutput| {
            output.format.driver.capabilities().verbatim && output.format.outer.is_none()
        };
        // Zeros are written like data to a raw image in a pipe, but to nothing else.
        let mut outputs = self.layout.outputs.iter().zip(sinks);
        let zeros_cost = outputs.any(|(planned, open)| is_verbatim(planned) && open.output.is_stream());
        let part = |(index, source): (usize, &OpenSource)| {
            let disks = sources::of_source(&self.selected, index);
            let copied: Vec<_> = disks.map(|(slot, disk)| (Lane(slot.0), disk.device.id)).collect();
            let opened = &source.opened;
            let (consumed, len) = (opened.consumed.clone(), opened.stored_len);
            Part::new(&*opened.image, &copied, consumed, len, zeros_cost || opened.salvages)
        };
        sources.iter().enumerate().map(part).collect()
    }

    /// Returns the devices whose data `job` copies, if the source is not a stream, and not salvaged.
    pub(super) fn surveyed(&self, source: &OpenSource, job: &Job<'_>) -> Result<Vec<SurveyedDevice>> {
        let image = &source.opened.image;
        if source.opened.salvages {
            return Ok(Vec::new());
        }
        let resolutions = pipeline::resolutions(&**image, job)?;
        let surveyed = |(route, resolution): (&Route, u64)| SurveyedDevice {
            lane: route.lane,
            image: Arc::clone(image),
            device: route.from,
            size: image.info().device(route.from).map_or(0, |device| device.size),
            resolution: Some(resolution),
        };
        Ok(job.routes.iter().zip(resolutions).map(surveyed).collect())
    }
}
