package ota_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"runtime/debug"
	"sync/atomic"
	"testing"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/stretchr/testify/require"
)

var sweepSeeds = flag.Int("sweep.seeds", 1, "seeds per fault point of the sweeps")

// world is a simulated device with what was promised about it so far.
type world struct {
	d   *sim.Device
	dev *ota.Device
	o   ota.Options

	promised int // image that a committed boot must start
	maybe    int // image that it may start instead, while an answer is missing
	trial    int // image that may run uncommitted
	boots    int // how often it did
	dead     bool
	floor    uint64
	wrote    error // a write where none is allowed
}

func newWorld(g sim.Geometry) (*world, error) {
	d, err := sim.New(g)
	if err != nil {
		return nil, err
	}
	w := &world{d: d, promised: 1}
	return w, w.boot()
}

// clone returns a copy of w on a chip of its own, just booted.
func (w *world) clone() (*world, error) {
	c := *w
	var err error
	if c.d, err = w.d.Clone(); err != nil {
		return nil, err
	}
	return &c, nil
}

// guard notes writes to the running slot and, during a trial, to any slot.
func (w *world) guard() {
	w.d.Chip.OnOp(func(op memflash.Op) {
		slot := ota.SlotID(op.Flash / 2)
		if op.Kind == memflash.OpRead || int(slot) >= len(w.d.Slots) || w.wrote != nil {
			return
		}
		switch {
		case w.dev == nil:
			w.wrote = fmt.Errorf("%v in slot %d during boot", op.Kind, slot)
		case slot == w.dev.Running():
			w.wrote = fmt.Errorf("%v in running slot %d", op.Kind, slot)
		default:
			if s, err := w.dev.BootState(context.Background()); err != nil || !s.Committed {
				w.wrote = fmt.Errorf("%v in slot %d during a trial (%v)", op.Kind, slot, err)
			} else if s.Active == slot || s.Revert == slot {
				w.wrote = fmt.Errorf("%v in slot %d, which the boot state points to", op.Kind, slot)
			}
		}
	})
}

// boot restarts the device and checks what it starts.
func (w *world) boot() error {
	w.dev = nil
	w.guard()
	o := w.o
	o.Platform, o.Product, o.BufferSize = "sim", "demo", 1<<10
	dev, h, err := w.d.Boot(context.Background(), &o)
	if err != nil {
		return err
	}
	w.dev = dev
	v := w.d.Identify(h.Slot)
	s := h.State
	switch {
	case v == 0:
		return violation("I1: slot %d is started and is not complete", h.Slot)
	case sim.Security(v) < s.Floor:
		return violation("I7: image %d is started below the floor %d", v, s.Floor)
	case s.Floor < w.floor:
		return violation("I7: the floor fell from %d to %d", w.floor, s.Floor)
	case s.Committed && v != w.promised && v != w.maybe:
		return violation("I4: image %d is started, %d was promised", v, w.promised)
	case s.Committed:
		w.promised, w.maybe, w.trial = v, 0, 0
	case v != w.trial:
		return violation("I10: image %d is started on trial, not %d", v, w.trial)
	case w.dead:
		return violation("I6: image %d is back after it was reverted", v)
	case w.boots > 0:
		return violation("I3: image %d boots once more without a commit", v)
	default:
		w.boots++
	}
	w.floor = s.Floor
	return nil
}

type violationError struct{ error }

func violation(format string, args ...any) error {
	return violationError{fmt.Errorf(format, args...)}
}

func (w *world) startTrial(v int) { w.trial, w.boots, w.dead = v, 0, false }

func (w *world) update(v int, timeout time.Duration) error {
	w.startTrial(v)
	_, err := w.dev.Update(context.Background(), &sim.Image{V: v}, &ota.UpdateOptions{CommitTimeout: timeout})
	return err
}

func (w *world) commit() error {
	w.maybe = w.trial
	if err := w.dev.Commit(context.Background()); err != nil {
		return err
	}
	w.promised, w.maybe, w.trial = w.trial, 0, 0
	return nil
}

func (w *world) revert() error {
	if err := w.dev.Revert(context.Background()); err != nil {
		return err
	}
	w.dead = true
	return nil
}

// expire lets the commit timeout run out under Watch.
func (w *world) expire() error {
	err := w.dev.Watch(context.Background())
	switch {
	case errors.Is(err, memflash.ErrPowerOff), errors.Is(err, memflash.ErrFault):
		return err
	case !errors.Is(err, ota.ErrReverted):
		return fmt.Errorf("watch returned %w", err)
	}
	w.dead = true
	return nil
}

func (w *world) snapshot(setAsRevert bool) error {
	if setAsRevert {
		w.startTrial(w.promised)
	}
	_, err := w.dev.CreateSnapshot(context.Background(), &ota.SnapshotOptions{SetAsRevert: setAsRevert})
	return err
}

func (w *world) setActive(v int) error {
	w.startTrial(v)
	other := 1 - w.dev.Running()
	return w.dev.SetBootState(context.Background(), ota.BootStatePatch{Active: &other})
}

// settle reboots until the device runs a committed image, which must take two
// boots at most, and if update is set makes sure that it can still be updated.
func (w *world) settle(update bool) error {
	w.d.Chip.Plan()
	w.d.Chip.PowerOn()
	for n := 1; ; n++ {
		if err := w.boot(); err != nil {
			return err
		}
		s, err := w.dev.BootState(context.Background())
		if err != nil {
			return err
		}
		if s.Committed && s.Active == w.dev.Running() {
			break
		}
		if n == 2 {
			return violation("I16: not committed after two boots: %+v", s)
		}
	}
	if !update {
		return w.misuse()
	}
	if err := w.update(7, 0); err != nil {
		return violation("I16: no update afterwards: %w", err)
	}
	if err := w.boot(); err != nil {
		return err
	}
	if err := w.commit(); err != nil {
		return violation("I16: no commit afterwards: %w", err)
	}
	if err := w.boot(); err != nil {
		return err
	}
	if w.promised != 7 || w.floor != sim.Security(7) {
		return violation("I4: image %d is committed, floor %d", w.promised, w.floor)
	}
	return w.misuse()
}

// misuse reports writes where none are allowed.
func (w *world) misuse() error {
	if w.wrote != nil {
		return violation("I2: %w", w.wrote)
	}
	if err := w.d.Chip.Err(); err != nil {
		return violation("misuse of flash: %w", err)
	}
	return nil
}

// scenario is something done to a device, to be interrupted anywhere.
type scenario struct {
	name string
	o    ota.Options
	prep func(*world) error
	run  func(*world) error
}

// steps runs functions one after the other until one fails.
func steps(fs ...func() error) error {
	for _, f := range fs {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

// runsV2 leaves version 2 running and committed, with version 1 beside it.
func runsV2(w *world) error {
	return steps(func() error { return w.update(2, 0) }, w.boot, w.commit, w.boot)
}

// besideV3 leaves version 3 beside it, reverted.
func besideV3(w *world) error {
	return steps(func() error { return runsV2(w) }, func() error { return w.update(3, 0) }, w.boot, w.revert, w.boot)
}

func scenarios() []scenario {
	late := ota.Options{BootClock: func() (time.Duration, error) { return time.Hour, nil },
		Reset: func(context.Context) error { return nil }}
	update := func(w *world) func() error { return func() error { return w.update(3, 0) } }
	return []scenario{
		{name: "first update", run: func(w *world) error { return w.update(3, 0) }},
		{name: "update", prep: runsV2, run: func(w *world) error { return w.update(3, 0) }},
		{name: "update+commit", prep: runsV2, run: func(w *world) error { return steps(update(w), w.boot, w.commit) }},
		{name: "update+revert", prep: runsV2, run: func(w *world) error { return steps(update(w), w.boot, w.revert, w.boot) }},
		{name: "update+timeout", prep: runsV2, o: late, run: func(w *world) error {
			return steps(func() error { return w.update(3, time.Minute) }, w.boot, w.expire, w.boot)
		}},
		{name: "update again", prep: besideV3, run: func(w *world) error { return steps(update(w), w.boot, w.commit) }},
		{name: "snapshot", prep: runsV2, run: func(w *world) error { return w.snapshot(false) }},
		{name: "set_as_revert", prep: runsV2, run: func(w *world) error {
			return steps(func() error { return w.snapshot(true) }, w.boot, w.commit)
		}},
		{name: "setbootstate", prep: besideV3, run: func(w *world) error {
			return steps(func() error { return w.setActive(3) }, w.boot, w.commit)
		}},
	}
}

// sweep runs sc once for each operation and fault and returns the number of runs.
func sweep(g sim.Geometry, sc scenario, faults func(seed uint64) []memflash.Fault, seeds int) (int, error) {
	base, err := newWorld(g)
	if err != nil {
		return 0, err
	}
	base.o = sc.o
	if sc.prep != nil {
		if err := sc.prep(base); err != nil {
			return 0, fmt.Errorf("preparing: %w", err)
		}
	}
	clean, err := base.clone()
	if err != nil {
		return 0, err
	}
	if err := steps(clean.boot, func() error { return sc.run(clean) }); err != nil {
		return 0, fmt.Errorf("without a fault: %w", err)
	}
	ops := clean.d.Chip.Ops()
	if err := clean.settle(true); err != nil {
		return 0, fmt.Errorf("without a fault: %w", err)
	}
	n := 0
	for at := range ops {
		for seed := range seeds {
			for k, f := range faults(sim.Seed(at, seed)) {
				w, err := base.clone()
				if err != nil {
					return n, err
				}
				f.At = at
				w.d.Chip.Plan(f)
				err = steps(w.boot, func() error { return sc.run(w) })
				var bad violationError
				if !errors.As(err, &bad) {
					err = w.settle(n%3 == 0)
				}
				if err != nil {
					return n, fmt.Errorf("op %d of %d, fault %d, seed %d: %w", at, ops, k, seed, err)
				}
				n++
			}
		}
	}
	return n, nil
}

// sweepAll runs every scenario on the given geometries in parallel.
func sweepAll(t *testing.T, gs []sim.Geometry, faults func(seed uint64) []memflash.Fault) {
	defer debug.SetGCPercent(debug.SetGCPercent(800)) // many small short-lived devices
	var total atomic.Int64
	t.Run("all", func(t *testing.T) {
		for _, g := range gs {
			for _, sc := range scenarios() {
				t.Run(g.Name+"/"+sc.name, func(t *testing.T) {
					t.Parallel()
					n, err := sweep(g, sc, faults, *sweepSeeds)
					require.NoError(t, err)
					require.Positive(t, n)
					total.Add(int64(n))
				})
			}
		}
	})
	t.Logf("%d runs with a fault", total.Load())
}

// A power cut at every operation, in every way, leaves a device that boots what
// was promised and can be updated.
func TestPowerCutSweep(t *testing.T) {
	gs := sim.Geometries()
	if testing.Short() {
		gs = gs[:1]
	}
	sweepAll(t, gs, memflash.TearModes)
}

// So does an operation that fails, or that does nothing and says nothing.
func TestFaultSweep(t *testing.T) {
	sweepAll(t, sim.Geometries()[:3], func(seed uint64) []memflash.Fault {
		return []memflash.Fault{
			{Kind: memflash.Fail, Seed: seed},
			{Kind: memflash.Fail, N: 5, Seed: seed, Loss: memflash.LoseSome},
			{Kind: memflash.Skip, Seed: seed},
		}
	})
}
