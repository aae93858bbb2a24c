"""From the configuration to the networks and objectives of `learn/`."""

from coda_ray.config import Config, steps_of
from coda_ray.learn.dino import CollapseGuard, DinoLoss
from coda_ray.learn.dual import DualModel
from coda_ray.learn.heads import DinoHead, init_fan_in
from coda_ray.learn.mae import DecoderSpec, MaeObjective, MaskedAutoencoder
from coda_ray.learn.objectives import DinoObjective, DinoSchedule
from coda_ray.learn.supervised import SupervisedModel
from coda_ray.learn.views import ViewRecipe
from coda_ray.learn.vit import VitSpec, build_vit, initialise


def vit_spec(config: Config, channels: int) -> VitSpec:
    """Sizes of the transformer."""
    model = config.model
    if model.arch != "vit":
        return VitSpec(model.arch, None, channels)
    return VitSpec("vit", config.views.size_global, channels, model.patch, model.width, model.depth, model.heads)


def recipe(config: Config) -> ViewRecipe:
    """How views are cut."""
    return ViewRecipe(**config.views.model_dump())


def is_small(config: Config) -> bool:
    """Whether heads are drawn as small networks need them (`learn.heads.init_fan_in`)."""
    return config.model.init in ("fan-in", "simulated")


def unfilled(config: Config) -> Config:
    """Settings of a network whose weights are about to be replaced: nothing is fetched for it."""
    return config.model_copy(update={"model": config.model.model_copy(update={"init": "random"})})


def dino_objective(config: Config, *, channels: int, steps: int, steps_per_epoch: int, seed: int) -> DinoObjective:
    """Build student, teacher, head and loss from initial weights."""
    dino = config.dino
    backbone = build_vit(vit_spec(config, channels), drop_path=dino.drop_path)
    initialise(backbone, config.model.init)
    head = DinoHead(backbone.embed_dim, hidden=dino.head_hidden, bottleneck=dino.head_bottleneck, out_dim=dino.out_dim)
    if is_small(config):
        init_fan_in(head.mlp)
    schedule = DinoSchedule(
        steps=steps,
        ema_start=dino.ema_start,
        ema_end=dino.ema_end,
        teacher_temperature_start=dino.teacher_temperature_start,
        teacher_temperature=dino.teacher_temperature,
        teacher_temperature_ramp=steps_of(dino.teacher_temperature_ramp, steps_per_epoch),
        freeze_last_layer=steps_of(dino.freeze_last_layer, steps_per_epoch),
    )
    criterion = DinoLoss(
        dino.out_dim,
        student_temperature=dino.student_temperature,
        centre_momentum=dino.centre_momentum,
        centering=dino.centering,
    )
    return DinoObjective(
        backbone, head, criterion, schedule=schedule, recipe=recipe(config), koleo_weight=dino.koleo_weight, seed=seed
    )


def masked_autoencoder(config: Config, *, channels: int) -> MaskedAutoencoder:
    """Build encoder and decoder from initial weights."""
    encoder = build_vit(vit_spec(config, channels), drop_path=0.0)
    initialise(encoder, config.model.init)
    mae = config.mae
    network = MaskedAutoencoder(
        encoder, DecoderSpec(mae.decoder_width, mae.decoder_depth, mae.decoder_heads), mask_ratio=mae.mask_ratio
    )
    if is_small(config):
        init_fan_in(network.decoder)
    return network


def mae_objective(config: Config, *, channels: int, seed: int) -> MaeObjective:
    """Build the masked autoencoder as an objective."""
    return MaeObjective(masked_autoencoder(config, channels=channels), recipe=recipe(config), seed=seed)


def collapse_guard(config: Config, *, compounds: int, section: str) -> CollapseGuard:
    """Build the guard of the teacher's entropy over images of some compounds; its advice names a section of the configuration."""
    dino = config.dino
    return CollapseGuard(
        dino.out_dim,
        kinds=compounds,
        floor=dino.collapse_floor,
        ceiling=dino.collapse_ceiling,
        patience=dino.collapse_patience,
        action=dino.collapse,
        section=section,
    )


def classifier_model(config: Config, *, channels: int, classes: int, dual: bool) -> SupervisedModel | DualModel:
    """Build the model of the labelled stage; a dual model's extractor still waits for its weights."""
    spec = vit_spec(config, channels)
    trained = build_vit(spec, drop_path=config.classify.drop_path)
    initialise(trained, config.model.init)
    model = DualModel(build_vit(spec, drop_path=0.0), trained, classes) if dual else SupervisedModel(trained, classes)
    if config.model.init == "fan-in":
        init_fan_in(model)
    elif config.model.init == "simulated":  # its blocks are trained; what stands around them is not
        for layer in (model.project, model.head) if isinstance(model, DualModel) else (model.head,):
            init_fan_in(layer)
    return model
