package boottest

import (
	"context"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
)

// OnChip returns b, which keeps its state on chip, as a [Faulter]: the chip is
// made to fail. The bootloader returned has Heal if b has it. Call OnChip for each
// restart, always with the same chip.
func OnChip(b ota.Bootloader, chip *memflash.Chip) ota.Bootloader {
	f := chipFaulter{b, chip}
	if h, ok := b.(ota.Healer); ok {
		return chipHealer{f, h}
	}
	return f
}

type chipFaulter struct {
	ota.Bootloader
	chip *memflash.Chip
}

type chipHealer struct {
	chipFaulter
	h ota.Healer
}

func (f chipHealer) Heal(ctx context.Context) (ota.BootState, error) { return f.h.Heal(ctx) }

// MaxTries implements [ota.TryLimiter].
func (f chipFaulter) MaxTries() int {
	if l, ok := f.Bootloader.(ota.TryLimiter); ok {
		return l.MaxTries()
	}
	return 0
}

// Fault implements [Faulter].
func (f chipFaulter) Fault(k Fault, n int) func() bool {
	stats := f.chip.Stats()
	fault := memflash.Fault{At: stats.Ops + n, Seed: uint64(n)}
	switch k {
	case Cut:
		fault.Kind, fault.Loss = memflash.CutBits, memflash.LoseSome
	case Fail:
		fault.Kind = memflash.Fail
	case Drop:
		fault.Kind = memflash.Skip
	case FailRead:
		fault.Kind, fault.On, fault.At = memflash.Fail, memflash.OpRead, stats.Reads+n
	}
	f.chip.Plan(fault)
	return func() bool {
		struck := f.chip.Pending() == 0
		f.chip.Plan()
		f.chip.PowerOn()
		return struck
	}
}
