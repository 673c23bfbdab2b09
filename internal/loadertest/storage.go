package loadertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/crashtest"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
)

// Machine is a simulated chip with what a kernel makes of it: the ground on which
// implementations of ota.Flash stand that make system calls.
type Machine interface {
	Chip() *memflash.Chip
	// Clone returns a copy, as it is between two boots.
	Clone() Machine
	// Open opens what a program would open after a reset: two slots with the parts
	// "app" and "fs", of 4 and 2 KiB at least, and the copies of the boot record.
	Open() (slots []ota.Slot, record []ota.Flash, err error)
	// Slot returns the slot that a flash of the chip belongs to.
	Slot(flash int) ota.SlotID
}

// Storage sweeps power cuts over devices on m: an update, a trial, a commit, a trial
// that is not committed, with a fault of modes at every operation; two, in
// the trials, if twice is set. Whatever strikes, what is started is a complete image,
// and the one that was promised; slots that must not be written are not; and the device
// can be updated again.
func Storage(t *testing.T, name string, m Machine, modes crashtest.Modes, twice bool, replay string) {
	t.Helper()
	base := &device{m: m.Clone(), promised: 1}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	slots, _, err := base.m.Open()
	must(err)
	for _, p := range slots[0].Parts {
		must(fill(p.Flash, sim.Content(1, p.Name)))
	}
	ctx := t.Context()
	must(base.boot(ctx))
	must(base.update(ctx, 2))
	must(base.boot(ctx))
	must(base.commit(ctx))
	must(base.boot(ctx))
	trial := base.clone()
	must(trial.boot(ctx))
	must(trial.update(ctx, 3))

	var scenarios []crashtest.Scenario
	for _, sc := range []struct {
		name string
		base *device
		run  func(ctx context.Context, d *device) error
	}{
		{"update", base, func(ctx context.Context, d *device) error { return d.update(ctx, 3) }},
		{"trial-commit", trial, func(ctx context.Context, d *device) error { return d.commit(ctx) }},
		{"trial-reset", trial, func(context.Context, *device) error { return nil }},
		{"whole-life", base, func(ctx context.Context, d *device) error {
			return cmpErr(func() error { return d.update(ctx, 3) }, func() error { return d.boot(ctx) }, func() error { return d.commit(ctx) },
				func() error { return d.boot(ctx) }, func() error { return d.update(ctx, 4) }, func() error { return d.boot(ctx) },
				func() error { return d.dev.Revert(ctx) })
		}},
	} {
		scenarios = append(scenarios, crashtest.Scenario{
			Name: name + "/" + sc.name,
			New: func(context.Context) (*crashtest.Device, error) {
				d := sc.base.clone()
				return &crashtest.Device{
					Chip: d.m.Chip(),
					Run: func(ctx context.Context) error {
						err := cmpErr(func() error { return d.boot(ctx) }, func() error { return sc.run(ctx, d) })
						return cmp(err, d.wrote())
					},
					Check: func(ctx context.Context) error { return cmp(d.settle(ctx), d.wrote()) },
				}, nil
			},
		})
	}
	o := crashtest.Options{Faults: []crashtest.Modes{modes}, Replay: replay}
	crashtest.Run(t, scenarios, &o)
	if twice && replay == "" {
		o.Faults = append(o.Faults, modes)
		crashtest.Run(t, scenarios[1:3], &o)
	}
}

// cmpErr calls steps until one fails.
func cmpErr(steps ...func() error) error {
	for _, do := range steps {
		if err := do(); err != nil {
			return err
		}
	}
	return nil
}

// cmp returns what matters more: a broken promise.
func cmp(err, broken error) error {
	if broken != nil {
		return broken
	}
	return err
}

func fill(f ota.Flash, b []byte) error {
	b = slices.Clone(b)
	if w := ota.WriteSize(f); int64(len(b))%w != 0 {
		b = append(b, bytes.Repeat([]byte{0xff}, int(w-int64(len(b))%w))...)
	}
	if e, ok := f.(ota.Eraser); ok {
		if err := e.Erase(0, f.Size()); err != nil {
			return err
		}
	}
	if _, err := f.WriteAt(b, 0); err != nil {
		return err
	}
	return f.Sync()
}

// device is a machine with what was promised about it.
type device struct {
	m     Machine
	slots []ota.Slot
	dev   *ota.Device

	promised int // image that a committed boot starts
	maybe    int // image that it may start instead
	trial    int // image that may run once, uncommitted
	boots    int
	bad      atomic.Pointer[error]
}

func (d *device) clone() *device {
	return &device{m: d.m.Clone(), promised: d.promised, maybe: d.maybe, trial: d.trial, boots: d.boots}
}

func broken(format string, args ...any) error {
	return fmt.Errorf("%w: %w", crashtest.ErrViolation, fmt.Errorf(format, args...))
}

// wrote returns what was written that must not be.
func (d *device) wrote() error {
	if p := d.bad.Load(); p != nil {
		return *p
	}
	return nil
}

// guard watches the slots that must not be written.
func (d *device) guard(running ota.SlotID) {
	d.m.Chip().OnOp(func(op memflash.Op) {
		id := d.m.Slot(op.Flash)
		if op.Kind == memflash.OpRead || id == ota.NoSlot {
			return
		}
		err := broken("%v in slot %d during boot", op.Kind, id)
		if running != ota.NoSlot {
			err = broken("%v in running slot %d", op.Kind, id)
		}
		if running == ota.NoSlot || id == running {
			d.bad.CompareAndSwap(nil, &err)
		}
	})
}

// boot is what follows a reset: the boot stage, and the firmware that opens the
// device.
func (d *device) boot(ctx context.Context) error {
	d.dev = nil
	d.guard(ota.NoSlot)
	slots, copies, err := d.m.Open()
	if err != nil {
		return err
	}
	d.slots = slots
	running := ota.NoSlot
	rec, err := bootrecord.New(copies, &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return running, nil }})
	if err != nil {
		return err
	}
	h, err := ota.Boot(ctx, rec, slots, &ota.BootOptions{BufferSize: 1 << 10})
	if err != nil {
		return err
	}
	switch v := d.identify(h.Slot); {
	case v == 0:
		return broken("slot %d is started and is not complete: %+v", h.Slot, h.State)
	case h.State.Committed && v != d.promised && v != d.maybe:
		return broken("image %d is started, %d was promised", v, d.promised)
	case h.State.Committed:
		d.promised, d.maybe, d.trial = v, 0, 0
	case v == d.promised:
		// The boot could not be counted, so it does not go to the trial.
	case v != d.trial || d.boots > 0:
		return broken("image %d is started on trial for the %d. time, not %d", v, d.boots+1, d.trial)
	default:
		d.boots++
	}
	running = h.Slot
	d.guard(running)
	d.dev, err = ota.Open(ctx, rec, slots, &ota.Options{Platform: "sim", Product: "demo", BufferSize: 1 << 10})
	return err
}

// identify returns which image a slot holds, as its flashes have it, 0 if none.
func (d *device) identify(id ota.SlotID) int {
	for v := 1; v <= sim.Versions; v++ {
		if !slices.ContainsFunc(d.slots[id].Parts, func(p ota.Part) bool {
			want := sim.Content(v, p.Name)
			got := make([]byte, len(want))
			n, err := p.Flash.ReadAt(got, 0)
			return n < len(got) || err != nil && !errors.Is(err, io.EOF) || !bytes.Equal(got, want)
		}) {
			return v
		}
	}
	return 0
}

// tries is how often an update is repeated that failed at bad blocks.
const tries = 4

func (d *device) update(ctx context.Context, v int) (err error) {
	d.trial, d.boots = v, 0
	for range tries {
		var res ota.UpdateResult
		res, err = d.dev.Update(ctx, &sim.Image{V: v}, nil)
		if err == nil && d.identify(res.Slot) != v {
			return broken("after the update slot %d is not complete", res.Slot)
		}
		if err == nil || errors.Is(err, memflash.ErrPowerOff) {
			return err
		}
		if id, ierr := d.promisedIn(); ierr != nil {
			return cmp(err, ierr)
		} else if s, serr := d.dev.BootState(ctx); serr == nil && (!s.Committed || s.Active != id) {
			return broken("the update failed (%w) and left %+v", err, s)
		}
	}
	return broken("%d updates in a row failed: %w", tries, err)
}

func (d *device) promisedIn() (ota.SlotID, error) {
	id := d.dev.Running()
	if v := d.identify(id); v != d.promised {
		return id, broken("image %d is in running slot %d, %d was promised", v, id, d.promised)
	}
	return id, nil
}

func (d *device) commit(ctx context.Context) error {
	d.maybe = d.trial
	err := d.dev.Commit(ctx)
	if err == nil {
		d.promised, d.maybe, d.trial = d.trial, 0, 0
	}
	return err
}

// settle reboots until a committed image runs, and updates the device once more.
func (d *device) settle(ctx context.Context) error {
	for n := 1; ; n++ {
		if err := d.boot(ctx); err != nil {
			return err
		}
		s, err := d.dev.BootState(ctx)
		if err != nil {
			return err
		}
		if s.Committed && s.Active == d.dev.Running() {
			break
		}
		if n == 2 {
			return fmt.Errorf("not committed after two boots: %+v", s)
		}
	}
	return cmpErr(func() error { return d.update(ctx, 7) }, func() error { return d.boot(ctx) }, func() error { return d.commit(ctx) })
}
