// Package loadertest checks drivers of boot loaders (boot/driver) on simulated
// flash: conformance, and whole device lives with the power cut at every
// operation.
package loadertest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boottest"
	"github.com/slotota/ota/crashtest"
	"github.com/slotota/ota/flash/memflash"
)

// Loader is a simulated boot loader and the driver for it. A device has slots 0
// and 1 and came with slot 0.
type Loader struct {
	// Name identifies the loader among others.
	Name string
	// Flashes are the storage of the loader.
	Flashes []memflash.Config
	// Format writes what the loader's storage holds when the device is new; nil
	// if that is nothing.
	Format func(flashes []ota.Flash) error
	// Open returns the driver; running is for its Running.
	Open func(flashes []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error)
	// Boot does what the loader does at a reset, and returns the slot that it
	// starts.
	Boot func(ctx context.Context, flashes []ota.Flash) (ota.SlotID, error)
	// Reset does what begins a trial that is stored; nil if any reset does.
	Reset func(ctx context.Context, flashes []ota.Flash) error
	// Wears says that the loader counts every boot, also of committed slots.
	Wears bool
	// Erases says that the loader erases the slot of a trial that has failed.
	Erases bool
	// Intact reports what the driver must never change and has.
	Intact func(flashes []ota.Flash) error
	// Weak says that the loader's storage cannot settle a write that was cut and
	// reads well at times: the loader may find the old state then, and the
	// firmware the new one. The trial counts as pending in that case.
	Weak bool
	// Twice has two faults strike as well.
	Twice bool
	// Replay repeats one run, see crashtest.Options.
	Replay string
}

const records = 6 // flashes in front of the loader's

// new returns the storage of a new device.
func (l *Loader) new(t *testing.T) *memflash.Chip {
	var cfgs []memflash.Config
	for range records {
		cfgs = append(cfgs, memflash.Config{Size: 4096, EraseSize: 4096})
	}
	chip := memflash.NewChip(append(cfgs, l.Flashes...)...)
	if l.Format != nil {
		if err := l.Format(chip.Flashes()[records:]); err != nil {
			t.Fatal(err)
		}
	}
	return chip
}

// open returns the boot loader as the firmware in slot running sees it.
func (l *Loader) open(chip *memflash.Chip, running ota.SlotID) (*driver.Bootloader, error) {
	fs := chip.Flashes()
	current, err := bootrecord.New(fs[:3], nil)
	if err != nil {
		return nil, err
	}
	pending, err := bootrecord.New(fs[3:records], nil)
	if err != nil {
		return nil, err
	}
	d, err := l.Open(fs[records:], func(context.Context) (ota.SlotID, error) { return running, nil })
	if err != nil {
		return nil, err
	}
	return driver.New(d, current, pending)
}

// Conformance runs boottest.
func (l *Loader) Conformance(t *testing.T) {
	chip := l.new(t)
	boottest.Run(t, func(t *testing.T) ota.Bootloader {
		b, err := l.open(chip, 0)
		if err != nil {
			t.Fatal(err)
		}
		return boottest.OnChip(b, chip)
	})
	if err := chip.Err(); err != nil {
		t.Error(err)
	}
}

// restart is what follows a reset: the loader starts a slot, whose firmware opens
// the device.
func (l *Loader) restart(ctx context.Context, chip *memflash.Chip) (*ota.Device, error) {
	running, err := l.Boot(ctx, chip.Flashes()[records:])
	if err != nil {
		// However the power fails, the loader must find something to boot.
		return nil, fmt.Errorf("%w: nothing to boot: %w", crashtest.ErrViolation, err)
	}
	return l.started(ctx, chip, running)
}

// started opens the device as the firmware in slot running, however it came to run.
func (l *Loader) started(ctx context.Context, chip *memflash.Chip, running ota.SlotID) (*ota.Device, error) {
	b, err := l.open(chip, running)
	if err != nil {
		return nil, err
	}
	return ota.Open(ctx, b, slots(), nil)
}

// slots are two slots whose content does not matter, only the state does.
func slots() (s []ota.Slot) {
	for range 2 {
		s = append(s, ota.Slot{Parts: []ota.Part{{Name: "app", Flash: memflash.New(memflash.Config{Size: 64})}}})
	}
	return s
}

var known = ota.SlotState{
	Parts:    []ota.PartState{{Size: 64, SHA256: sha256.Sum256(make([]byte, 64))}},
	Approved: true,
}

// PowerCuts takes a device through a trial that is committed, reverted, or cut off
// by a reset, and has a fault strike at every operation. The slot that the loader
// starts and the boot state must always agree about what happened.
func (l *Loader) PowerCuts(t *testing.T) {
	one := ota.SlotID(1)
	begin := func(ctx context.Context, d *ota.Device, chip *memflash.Chip) error {
		err := d.SetBootState(ctx, ota.BootStatePatch{Active: &one})
		if err == nil && l.Reset != nil {
			err = l.Reset(ctx, chip.Flashes()[records:])
		}
		return err
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// Slot 1 was installed and is known.
	base := l.new(t)
	b, err := l.open(base, 0)
	must(err)
	first := ota.BootState{Committed: true, Revert: ota.NoSlot, Slots: []ota.SlotState{known, known}, Last: ota.Result{Slot: ota.NoSlot}}
	must(b.Store(t.Context(), first))
	trial := base.Clone()
	d, err := l.restart(t.Context(), trial)
	must(err)
	must(begin(t.Context(), d, trial))
	over := trial.Clone()
	d, err = l.restart(t.Context(), over)
	must(err)
	must(d.Commit(t.Context()))
	back := trial.Clone()
	d, err = l.restart(t.Context(), back)
	must(err)
	must(d.Revert(t.Context()))
	// Until it is reset the machine goes on with what was rejected.
	d, err = l.started(t.Context(), back, 1)
	must(err)
	if s, err := d.BootState(t.Context()); err != nil || s.Active != 0 || !d.Status().RebootPending {
		t.Fatalf("a restart of the program took back the revert: %+v, %v", s, err)
	}
	_, err = l.restart(t.Context(), back)
	must(err)

	var scenarios []crashtest.Scenario
	weak := false
	for _, sc := range []struct {
		name string
		base *memflash.Chip
		run  func(ctx context.Context, d *ota.Device, chip *memflash.Chip) error
		ok   func(s ota.BootState, running ota.SlotID, done bool) bool
	}{
		{"begin", base, begin, func(s ota.BootState, running ota.SlotID, done bool) bool {
			return trialOf1(s, running) || committed0(s, running) && (!done || fellBack(s))
		}},
		{"commit", trial, func(ctx context.Context, d *ota.Device, _ *memflash.Chip) error { return d.Commit(ctx) }, func(s ota.BootState, running ota.SlotID, done bool) bool {
			if running == 1 && s.Committed {
				return s.Active == 1 && s.Last.Outcome == ota.OutcomeCommitted
			}
			return !done && (trialOf1(s, running) || committed0(s, running) && fellBack(s))
		}},
		{"revert", trial, func(ctx context.Context, d *ota.Device, _ *memflash.Chip) error { return d.Revert(ctx) }, func(s ota.BootState, running ota.SlotID, done bool) bool {
			if done {
				return committed0(s, running) && s.Last.Reason == ota.ReasonRequested
			}
			return trialOf1(s, running) || committed0(s, running) && s.Last.Outcome == ota.OutcomeReverted
		}},
		{"reset", trial, func(context.Context, *ota.Device, *memflash.Chip) error { return nil }, func(s ota.BootState, running ota.SlotID, _ bool) bool {
			return trialOf1(s, running) || committed0(s, running) && fellBack(s)
		}},
		{"after", over, func(context.Context, *ota.Device, *memflash.Chip) error { return nil }, func(s ota.BootState, running ota.SlotID, _ bool) bool {
			return running == 1 && s.Committed && s.Active == 1 && s.Last.Outcome == ota.OutcomeCommitted
		}},
		// The loader cannot start what it is to start, and starts the rejected
		// firmware instead: nothing else can be updated from there on.
		{"fallback", back, func(ctx context.Context, _ *ota.Device, chip *memflash.Chip) error {
			d, err := l.started(ctx, chip, 1)
			if err != nil {
				return err
			}
			if err := d.Status().Err; err != nil {
				return err
			}
			s, err := d.BootState(ctx)
			if err == nil && s.Active != 1 {
				err = fmt.Errorf("a reboot is pending for ever: %+v", s)
			}
			return err
		}, func(s ota.BootState, running ota.SlotID, done bool) bool {
			if running == 1 && s.Committed {
				return s.Active == 1 && s.Last.Reason == ota.ReasonBootloader
			}
			if weak && !done && running == 0 && s.Committed && s.Active == 1 {
				return s.Last.Reason == ota.ReasonBootloader // pending, as a trial would be
			}
			return !done && committed0(s, running) && s.Last.Outcome == ota.OutcomeReverted
		}},
	} {
		if sc.name == "after" && !l.Wears || sc.name == "fallback" && l.Erases {
			continue // it would write nothing; it cannot be
		}
		scenarios = append(scenarios, crashtest.Scenario{
			Name: l.Name + "/" + sc.name,
			New: func(ctx context.Context) (*crashtest.Device, error) {
				chip := sc.base.Clone()
				var done atomic.Bool
				return &crashtest.Device{
					Chip: chip,
					Run: func(ctx context.Context) error {
						d, err := l.restart(ctx, chip)
						if err == nil {
							err = sc.run(ctx, d, chip)
						}
						done.Store(err == nil)
						return excuse(err)
					},
					Check: func(ctx context.Context) error {
						d, err := l.restart(ctx, chip)
						if err != nil {
							return excuse(err)
						}
						s, err := d.BootState(ctx)
						if err != nil {
							return err
						}
						if (weak || l.Reset != nil) && !done.Load() && pending1(s, d.Running()) {
							return nil
						}
						if !sc.ok(s, d.Running(), done.Load()) {
							return fmt.Errorf("%w: slot %d runs, done %v, state %+v", crashtest.ErrViolation, d.Running(), done.Load(), s)
						}
						if l.Intact == nil {
							return nil
						}
						if err := l.Intact(chip.Flashes()[records:]); err != nil {
							return fmt.Errorf("%w: %w", crashtest.ErrViolation, err)
						}
						return nil
					},
				}, nil
			},
		})
	}
	if !l.Weak {
		l.explore(t, scenarios, memflash.TearModes)
		return
	}
	l.explore(t, scenarios, func(seed uint64) []memflash.Fault {
		return slices.DeleteFunc(memflash.TearModes(seed), isWeak)
	})
	weak = true
	l.explore(t, scenarios, func(seed uint64) []memflash.Fault {
		return slices.DeleteFunc(memflash.TearModes(seed), func(f memflash.Fault) bool { return !isWeak(f) })
	})
}

func isWeak(f memflash.Fault) bool { return f.Kind == memflash.CutWeak }

// Transitions goes from each choice to each other one and cuts the power at every
// operation. What the loader then starts, boot after boot, is what it would have
// started before, or what it starts after a write that was not cut off.
func (l *Loader) Transitions(t *testing.T) {
	ctx := t.Context()
	var choices []driver.Choice
	for _, id := range []ota.SlotID{0, 1} {
		choices = append(choices, driver.Choice{Active: id, Revert: ota.NoSlot},
			driver.Choice{Active: id, Trial: true, Revert: 1 - id, Tries: 1},
			driver.Choice{Active: id, Trial: true, Revert: 1 - id, Booted: true})
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(chip *memflash.Chip, c driver.Choice) error {
		d, err := l.Open(chip.Flashes()[records:], nil)
		if err != nil {
			return err
		}
		return d.Write(ctx, c)
	}
	boots := func(chip *memflash.Chip) (s [3]ota.SlotID) {
		t.Helper()
		for i := range s {
			id, err := l.Boot(ctx, chip.Flashes()[records:])
			must(err)
			s[i] = id
		}
		if l.Intact != nil {
			must(l.Intact(chip.Flashes()[records:]))
		}
		return s
	}
	runs := 0
	for _, from := range choices {
		base := l.new(t)
		must(write(base, from))
		before := boots(base.Clone())
		for _, to := range choices {
			clean := base.Clone()
			if err := write(clean, to); err != nil {
				t.Fatalf("from %+v to %+v: %v", from, to, err)
			}
			after := boots(clean)
			for at := 0; ; at++ {
				done := false
				for _, f := range []memflash.Fault{{Kind: memflash.CutBefore}, {Kind: memflash.CutPrefix}, {Kind: memflash.CutAfter}, {Kind: memflash.CutAfter, Loss: memflash.LoseAll}} {
					chip := base.Clone()
					f.At = chip.Ops() + at
					chip.Plan(f)
					err := write(chip, to)
					if chip.Pending() > 0 {
						must(err)
						done = true
						break
					}
					runs++
					chip.PowerOn()
					// A trial may be called off before the opposite one begins.
					r := [3]ota.SlotID{from.Revert, from.Revert, from.Revert}
					off := from.Tries > 0 && to.Trial && from.Active != to.Active
					if got := boots(chip); got != before && got != after && !(off && got == r) || err == nil && got != after {
						t.Fatalf("from %+v to %+v, %v: starts slots %v, not %v or %v (%v)", from, to, f, got, before, after, err)
					}
				}
				if done {
					break
				}
			}
		}
	}
	t.Logf("%d transitions, %d cuts", len(choices)*len(choices), runs)
}

func (l *Loader) explore(t *testing.T, scenarios []crashtest.Scenario, m crashtest.Modes) {
	o := crashtest.Options{Faults: []crashtest.Modes{m}, Replay: l.Replay}
	if l.Twice {
		o.Faults = append(o.Faults, m)
	}
	crashtest.Run(t, scenarios, &o)
}

// excuse takes the mark of a broken promise from an error that the fault under
// way explains: while the power is off nothing boots.
func excuse(err error) error {
	if errors.Is(err, memflash.ErrPowerOff) || errors.Is(err, memflash.ErrFault) {
		return errors.New(err.Error())
	}
	return err
}

func trialOf1(s ota.BootState, running ota.SlotID) bool {
	return running == 1 && !s.Committed && s.Active == 1 && s.Revert == 0 && s.Booted
}

func pending1(s ota.BootState, running ota.SlotID) bool {
	return running == 0 && !s.Committed && s.Active == 1 && s.Revert == 0 && !s.Booted
}

func committed0(s ota.BootState, running ota.SlotID) bool {
	return running == 0 && s.Committed && s.Active == 0
}

func fellBack(s ota.BootState) bool {
	return s.Last.Outcome == ota.OutcomeReverted && s.Last.Reason == ota.ReasonBootloader && s.Slot(1).Rejected
}
