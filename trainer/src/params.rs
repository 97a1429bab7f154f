//! Parameters by name: what a model needs ([`Layout`]), and the values it runs with ([`Params`]).
//!
//! A model is two functions: one lists its parameters under the reference's names, the other binds
//! values to its layers. Everything that treats weights as numbers (optimizer, EMA, gradient
//! buckets, checkpoints, resharding) works on one flat float32 array, in layout order, and knows
//! no model.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use burn::tensor::{Device, FloatDType, Tensor, TensorData};

use crate::data::draws::{Draws, Purpose};
use crate::ops::{GradientSink, GradientSlot};
use crate::weights::{Weights, WeightsError};

/// How a parameter's first value is made.
#[derive(Debug, Clone, PartialEq)]
pub enum Init {
    /// All zeros.
    Zeros,
    /// All ones.
    Ones,
    /// Every element the same.
    Constant(f32),
    /// Normal with mean 0 and this standard deviation.
    Normal(f32),
    /// Uniform in +-sqrt(6 / (fan_in + fan_out)): PyTorch's `xavier_uniform_`.
    XavierUniform {
        /// Inputs of one output element.
        fan_in: usize,
        /// Outputs of one input element.
        fan_out: usize,
    },
    /// Uniform in +-bound (PyTorch's default for linear and convolution layers: 1/sqrt(fan_in)).
    Uniform(f32),
    /// Given values, such as a fixed position embedding.
    Values(Arc<Vec<f32>>),
}

/// One parameter of a model.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The reference implementation's name, such as `blocks.0.attn.qkv.weight`.
    pub name: String,
    /// Its shape, outermost dimension first, in PyTorch's layout (linear weights are [out, in]).
    pub shape: Vec<usize>,
    /// Whether the optimizer moves it. Frozen parameters have no place in the flat array.
    pub trainable: bool,
    /// How its first value is made.
    pub init: Init,
    /// Where it begins in the flat array, in elements (0 for frozen parameters).
    pub offset: usize,
}

impl Entry {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The values of a parameter that is not trained, flat.
    pub fn fixed(&self, device: &Device) -> Tensor<1> {
        let mut values = vec![0.0; self.len()];
        self.init.fill(&mut values, 0, 0);
        Tensor::from_data(TensorData::new(values, [self.len()]), device)
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The parameters of a model, in the order of the reference's `parameters()`.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    entries: Vec<Entry>,
    index: HashMap<String, usize>,
    trainable: usize,
}

impl Layout {
    /// Adds a parameter. A name that is taken is a programming error and panics.
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], init: Init) {
        self.push(name.into(), shape, init, true);
    }

    /// Adds a parameter that training leaves as it is.
    pub fn add_frozen(&mut self, name: impl Into<String>, shape: &[usize], init: Init) {
        self.push(name.into(), shape, init, false);
    }

    fn push(&mut self, name: String, shape: &[usize], init: Init, trainable: bool) {
        let offset = if trainable { self.trainable } else { 0 };
        let entry = Entry { name: name.clone(), shape: shape.to_vec(), trainable, init, offset };
        if trainable {
            self.trainable += entry.len();
        }
        assert!(
            self.index.insert(name.clone(), self.entries.len()).is_none(),
            "parameter {name} is listed twice"
        );
        self.entries.push(entry);
    }

    /// Adds `{name}.weight` [out, in] and, unless `bias` is None, `{name}.bias` [out].
    pub fn linear(&mut self, name: &str, inputs: usize, outputs: usize, weight: Init, bias: Option<Init>) {
        self.add(format!("{name}.weight"), &[outputs, inputs], weight);
        if let Some(bias) = bias {
            self.add(format!("{name}.bias"), &[outputs], bias);
        }
    }

    /// All parameters, in order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// A parameter by name.
    pub fn find(&self, name: &str) -> Option<&Entry> {
        self.index.get(name).map(|&i| &self.entries[i])
    }

    /// Length of the flat array: the elements of all trainable parameters.
    pub fn trainable_len(&self) -> usize {
        self.trainable
    }

    /// Elements of all parameters, frozen ones included.
    pub fn total_len(&self) -> usize {
        self.entries.iter().map(Entry::len).sum()
    }

    /// First values of the trainable parameters as the flat array. They follow from `seed` and the
    /// parameter's position alone, so every rank makes the same.
    pub fn initial_values(&self, seed: u64) -> Vec<f32> {
        let mut flat = vec![0.0; self.trainable];
        for (number, entry) in self.entries.iter().enumerate().filter(|(_, e)| e.trainable) {
            entry.init.fill(&mut flat[entry.offset..entry.offset + entry.len()], seed, number as u64);
        }
        flat
    }
}

impl Init {
    /// Fills `out` with the first values of the parameter at position `number` of its layout.
    pub(crate) fn fill(&self, out: &mut [f32], seed: u64, number: u64) {
        let draws = Draws::new(seed, Purpose::Init);
        match self {
            Init::Zeros => out.fill(0.0),
            Init::Ones => out.fill(1.0),
            Init::Constant(c) => out.fill(*c),
            Init::Normal(std) => {
                draws.normal(number, out);
                out.iter_mut().for_each(|x| *x *= std);
            }
            Init::XavierUniform { fan_in, fan_out } => {
                let bound = (6.0 / (fan_in + fan_out) as f64).sqrt() as f32;
                Init::Uniform(bound).fill(out, seed, number);
            }
            Init::Uniform(bound) => {
                draws.uniform(number, out);
                out.iter_mut().for_each(|x| *x = (2.0 * *x - 1.0) * bound);
            }
            Init::Values(values) => out.copy_from_slice(values),
        }
    }
}

/// Values for a layout, on a device: one flat tensor a parameter.
#[derive(Debug, Clone)]
pub struct Params {
    layout: Arc<Layout>,
    values: Arc<Values>,
    /// The type that [`Params::get`] casts to.
    dtype: Option<FloatDType>,
    watch: Option<Watch>,
}

/// Gives a parameter's flat tensor, by its number in the layout.
type Source = Box<dyn Fn(usize, &Entry) -> Tensor<1> + Send + Sync>;

/// Each parameter's tensor, once it has been asked for.
struct Values {
    tensors: Vec<OnceLock<Tensor<1>>>,
    source: Source,
}

impl std::fmt::Debug for Values {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Values").field("tensors", &self.tensors.len()).finish_non_exhaustive()
    }
}

/// Where gradients go while the backward pass runs.
#[derive(Debug, Clone)]
struct Watch {
    sink: Arc<dyn GradientSink>,
    behind: Option<Tensor<3>>,
}

impl Params {
    /// Values from the flat array `flat` (trainable parameters, in layout order) and from the
    /// layout's own initial values for frozen parameters. On a device made by
    /// `Device::autodiff`, trainable values are leaves whose gradients [`Params::gradients`] reads.
    pub fn from_flat(layout: &Arc<Layout>, flat: &[f32], device: &Device) -> Self {
        assert_eq!(flat.len(), layout.trainable_len(), "flat array does not fit the layout");
        let tracked = device.is_autodiff();
        let values = layout
            .entries()
            .iter()
            .map(|entry| {
                if entry.trainable {
                    let part = flat[entry.offset..entry.offset + entry.len()].to_vec();
                    let tensor = Tensor::<1>::from_data(TensorData::new(part, [entry.len()]), device);
                    if tracked { tensor.require_grad() } else { tensor }
                } else {
                    entry.fixed(device)
                }
            })
            .collect();
        Self::plain(layout, values)
    }

    /// Values that `source` gives when they are first asked for, each flat, by its number in the layout. Trainable ones
    /// become leaves whose gradients can be watched.
    pub fn when_asked(
        layout: &Arc<Layout>,
        source: impl Fn(usize, &Entry) -> Tensor<1> + Send + Sync + 'static,
    ) -> Self {
        let leaf = move |number, entry: &Entry| {
            let tensor = Tensor::from_inner(source(number, entry));
            if entry.trainable { tensor.require_grad() } else { tensor }
        };
        let tensors = layout.entries().iter().map(|_| OnceLock::new()).collect();
        Self::of(layout, Values { tensors, source: Box::new(leaf) })
    }

    fn plain(layout: &Arc<Layout>, values: Vec<Tensor<1>>) -> Self {
        let tensors = values.into_iter().map(OnceLock::from).collect();
        Self::of(layout, Values { tensors, source: Box::new(|_, _| unreachable!("all are there")) })
    }

    fn of(layout: &Arc<Layout>, values: Values) -> Self {
        Self { layout: layout.clone(), values: Arc::new(values), dtype: None, watch: None }
    }

    fn value(&self, number: usize) -> Tensor<1> {
        let Values { tensors, source } = &*self.values;
        tensors[number].get_or_init(|| source(number, &self.layout.entries[number])).clone()
    }

    /// Values from a weight file that must hold exactly this layout's parameters.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] lists every tensor that is missing, unexpected or misshapen.
    pub fn from_weights(
        layout: &Arc<Layout>,
        weights: &Weights,
        device: &Device,
    ) -> Result<Self, WeightsError> {
        weights.check(layout)?;
        let values = layout
            .entries()
            .iter()
            .map(|entry| {
                let values = weights.f32(&entry.name)?;
                Ok(Tensor::from_data(TensorData::new(values, [entry.len()]), device))
            })
            .collect::<Result<_, WeightsError>>()?;
        Ok(Self::plain(layout, values))
    }

    /// The layout that these values are for.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The value of a parameter, in its shape. A name that the layout lacks, or another rank than
    /// its shape has, is a programming error and panics.
    pub fn get<const D: usize>(&self, name: &str) -> Tensor<D> {
        let number =
            *self.layout.index.get(name).unwrap_or_else(|| panic!("no parameter {name} in the layout"));
        let entry = &self.layout.entries[number];
        let shape: [usize; D] = entry
            .shape
            .clone()
            .try_into()
            .unwrap_or_else(|shape| panic!("parameter {name} has shape {shape:?}, asked for rank {D}"));
        let value = self.value(number);
        let cast = |value: Tensor<1>| match self.dtype {
            Some(dtype) => value.cast(dtype),
            None => value,
        };
        match self.watch.as_ref().filter(|_| entry.trainable) {
            Some(watch) => {
                // What is cast is a leaf as well: who takes its gradient can convert it on the way to where it goes.
                let leaf = Tensor::from_inner(cast(value.inner())).require_grad();
                let slot = GradientSlot { offset: entry.offset, sink: Arc::clone(&watch.sink) };
                crate::ops::watch(leaf, watch.behind.as_ref(), slot)
            }
            None => cast(value),
        }
        .reshape(shape)
    }

    /// The same values, whose gradients go to `sink` as soon as the backward pass has done with all that
    /// follows `behind` (see [`crate::ops::watch`]). Each parameter may be got once.
    #[must_use]
    pub fn watched(&self, sink: &Arc<dyn GradientSink>, behind: Option<&Tensor<3>>) -> Self {
        Self { watch: Some(Watch { sink: Arc::clone(sink), behind: behind.cloned() }), ..self.clone() }
    }

    /// The parameters whose names begin with a prefix.
    pub fn scope(&self, prefix: impl Into<String>) -> Scope<'_> {
        Scope { params: self, prefix: prefix.into() }
    }

    /// The same values in another float type. Gradients flow back to these.
    pub fn cast(&self, dtype: FloatDType) -> Self {
        Self { dtype: Some(dtype), ..self.clone() }
    }

    /// Writes the gradient of every trainable parameter into the flat array `out`; parameters that
    /// the loss does not depend on get zeros.
    pub fn gradients(&self, gradients: &burn::tensor::Gradients, out: &mut [f32]) {
        assert_eq!(out.len(), self.layout.trainable_len(), "flat array does not fit the layout");
        let trainable = self.layout.entries.iter().enumerate().filter(|(_, entry)| entry.trainable);
        for (number, entry) in trainable {
            let part = &mut out[entry.offset..entry.offset + entry.len()];
            match self.value(number).grad(gradients) {
                Some(gradient) => {
                    let data = gradient.into_data().convert::<f32>();
                    part.copy_from_slice(data.as_slice::<f32>().expect("converted to f32 above"));
                }
                None => part.fill(0.0),
            }
        }
    }
}

/// A name prefix within [`Params`], for binding layers.
#[derive(Debug, Clone)]
pub struct Scope<'a> {
    params: &'a Params,
    prefix: String,
}

impl Scope<'_> {
    /// A scope further in: `scope("blocks").sub("0")` is `blocks.0`.
    pub fn sub(&self, name: impl std::fmt::Display) -> Self {
        Self { params: self.params, prefix: self.path(&name.to_string()) }
    }

    /// The parameter `{prefix}.{name}`.
    pub fn get<const D: usize>(&self, name: &str) -> Tensor<D> {
        self.params.get(&self.path(name))
    }

    /// The parameter `{prefix}.{name}`, if the layout has it.
    pub fn find<const D: usize>(&self, name: &str) -> Option<Tensor<D>> {
        let path = self.path(name);
        self.params.layout.find(&path).map(|_| self.params.get(&path))
    }

    fn path(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}
