package driver_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boottest"
	"github.com/slotota/ota/crashtest"
	"github.com/slotota/ota/flash/memflash"
)

var (
	long   = flag.Bool("crash.long", false, "cut the power twice as well")
	replay = flag.String("crash.replay", "", "repeat the run of this text")
)

// loader is a boot loader whose state is a record in flash. A one-shot loader
// keeps no trace of a trial once it has begun it.
type loader struct {
	rec     *bootrecord.Record
	oneShot bool
	running ota.SlotID
}

func (l *loader) Running(context.Context) (ota.SlotID, error) { return l.running, nil }

func (l *loader) Read(ctx context.Context) (driver.Choice, error) {
	s, err := l.rec.Load(ctx)
	if err != nil {
		return driver.Choice{}, err
	}
	if l.oneShot && !s.Committed && s.Booted {
		return driver.Choice{Active: s.Revert, Revert: ota.NoSlot}, nil
	}
	return driver.Choice{Active: s.Active, Trial: !s.Committed, Revert: s.Revert, Tries: s.Tries, Booted: s.Booted}, nil
}

func (l *loader) Write(ctx context.Context, c driver.Choice) error {
	return l.rec.Store(ctx, ota.BootState{Active: c.Active, Committed: !c.Trial, Revert: c.Revert, Tries: c.Tries, Booted: c.Booted})
}

// boot does what the loader does at a reset: it starts a slot.
func (l *loader) boot(ctx context.Context) error {
	s, err := l.rec.Heal(ctx)
	if errors.Is(err, ota.ErrNoBootState) {
		l.running = 0
		return nil
	}
	if err != nil {
		return err
	}
	switch {
	case s.Committed:
	case s.Tries > 0:
		s.Tries--
		s.Booted = true
		if err := l.rec.Store(ctx, s); err != nil {
			return err
		}
	default:
		l.running = s.Revert
		return nil
	}
	l.running = s.Active
	return nil
}

// rig is a loader and the library's records on one chip.
type rig struct {
	*driver.Bootloader
	l *loader
}

func open(t *testing.T, chip *memflash.Chip, oneShot bool) rig {
	var recs [3]*bootrecord.Record
	for i := range recs {
		var err error
		recs[i], err = bootrecord.New(chip.Flashes()[i*3:i*3+3], nil)
		require.NoError(t, err)
	}
	l := &loader{rec: recs[0], oneShot: oneShot}
	b, err := driver.New(l, recs[1], recs[2])
	require.NoError(t, err)
	return rig{b, l}
}

func newChip() *memflash.Chip {
	return memflash.NewChip(slices.Repeat([]memflash.Config{{Size: 4096, EraseSize: 4096}}, 9)...)
}

func TestConformance(t *testing.T) {
	for _, oneShot := range []bool{false, true} {
		t.Run(fmt.Sprintf("one shot %v", oneShot), func(t *testing.T) {
			chip := newChip()
			boottest.Run(t, func(t *testing.T) ota.Bootloader { return boottest.OnChip(open(t, chip, oneShot), chip) })
		})
	}
}

// restart is what follows a reset: the loader starts a slot, whose firmware opens
// the device.
func restart(ctx context.Context, t *testing.T, chip *memflash.Chip, oneShot bool, slots []ota.Slot) (*ota.Device, *loader, error) {
	r := open(t, chip, oneShot)
	if err := r.l.boot(ctx); err != nil {
		return nil, nil, err
	}
	d, err := ota.Open(ctx, r, slots, nil)
	return d, r.l, err
}

func broken(format string, args ...any) error {
	return fmt.Errorf("%w: %w", crashtest.ErrViolation, fmt.Errorf(format, args...))
}

// TestPowerCuts takes a device through trials, commits and reverts, and cuts the
// power at every operation on loader and records: the slot that the loader starts
// and the state must always agree about what happened.
func TestPowerCuts(t *testing.T) {
	// Slots whose content does not matter: SetBootState and the state do.
	var slots []ota.Slot
	for range 2 {
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "app", Flash: memflash.New(memflash.Config{Size: 64})}}})
	}
	one := ota.SlotID(1)
	begin := func(ctx context.Context, d *ota.Device) error {
		return d.SetBootState(ctx, ota.BootStatePatch{Active: &one})
	}
	var scenarios []crashtest.Scenario
	for _, oneShot := range []bool{false, true} {
		// The device came with slot 0, and slot 1 was installed and is known.
		base := newChip()
		r := open(t, base, oneShot)
		first := ota.BootState{Committed: true, Revert: ota.NoSlot, Slots: []ota.SlotState{known, known}, Last: ota.Result{Slot: ota.NoSlot}}
		require.NoError(t, r.Store(t.Context(), first))
		trial := base.Clone()
		d, _, err := restart(t.Context(), t, trial, oneShot, slots)
		require.NoError(t, err)
		require.NoError(t, begin(t.Context(), d))
		for _, sc := range []struct {
			name string
			base *memflash.Chip
			run  func(ctx context.Context, d *ota.Device) error
			ok   func(s ota.BootState, running ota.SlotID, done bool) bool
		}{
			{"begin", base, begin, func(s ota.BootState, running ota.SlotID, done bool) bool {
				return trialOf1(s, running) || committed0(s, running) && (!done || fellBack(s))
			}},
			{"commit", trial, func(ctx context.Context, d *ota.Device) error { return d.Commit(ctx) }, func(s ota.BootState, running ota.SlotID, done bool) bool {
				if running == 1 && s.Committed {
					return s.Active == 1 && s.Last.Outcome == ota.OutcomeCommitted
				}
				return !done && (trialOf1(s, running) || committed0(s, running) && fellBack(s))
			}},
			{"revert", trial, func(ctx context.Context, d *ota.Device) error { return d.Revert(ctx) }, func(s ota.BootState, running ota.SlotID, done bool) bool {
				if done {
					return committed0(s, running) && s.Last.Reason == ota.ReasonRequested
				}
				return trialOf1(s, running) || committed0(s, running) && s.Last.Outcome == ota.OutcomeReverted
			}},
			{"reset", trial, func(context.Context, *ota.Device) error { return nil }, func(s ota.BootState, running ota.SlotID, _ bool) bool {
				return trialOf1(s, running) || committed0(s, running) && fellBack(s)
			}},
		} {
			scenarios = append(scenarios, crashtest.Scenario{
				Name: fmt.Sprintf("%s/one-shot-%v", sc.name, oneShot),
				New: func(ctx context.Context) (*crashtest.Device, error) {
					chip := sc.base.Clone()
					done := false
					return &crashtest.Device{
						Chip: chip,
						Run: func(ctx context.Context) error {
							d, _, err := restart(ctx, t, chip, oneShot, slots)
							if err != nil {
								return err
							}
							err = sc.run(ctx, d)
							done = err == nil
							return err
						},
						Check: func(ctx context.Context) error {
							d, l, err := restart(ctx, t, chip, oneShot, slots)
							if err != nil {
								return err
							}
							s, err := d.BootState(ctx)
							if err != nil {
								return err
							}
							if !sc.ok(s, l.running, done) {
								return broken("slot %d runs, done %v, state %+v", l.running, done, s)
							}
							return nil
						},
					}, nil
				},
			})
		}
	}
	o := crashtest.Options{Faults: []crashtest.Modes{memflash.TearModes}, Replay: *replay}
	if *long {
		o.Faults = append(o.Faults, memflash.TearModes)
	}
	crashtest.Run(t, scenarios, &o)
}

func trialOf1(s ota.BootState, running ota.SlotID) bool {
	return running == 1 && !s.Committed && s.Active == 1 && s.Revert == 0 && s.Booted
}

func committed0(s ota.BootState, running ota.SlotID) bool {
	return running == 0 && s.Committed && s.Active == 0
}

func fellBack(s ota.BootState) bool {
	return s.Last.Outcome == ota.OutcomeReverted && s.Last.Reason == ota.ReasonBootloader && s.Slot(1).Rejected
}

var known = ota.SlotState{
	Parts:    []ota.PartState{{Size: 64, SHA256: sha256.Sum256(make([]byte, 64))}},
	Approved: true,
}

var errStop = errors.New("stop")

// TestForeignChange: another program has told the loader what to do.
func TestForeignChange(t *testing.T) {
	r := open(t, newChip(), false)
	ctx := t.Context()
	require.NoError(t, r.Store(ctx, ota.BootState{Committed: true, Revert: ota.NoSlot, Floor: 3}))
	require.NoError(t, r.l.Write(ctx, driver.Choice{Active: 1, Revert: ota.NoSlot}))
	s, err := r.Load(ctx)
	require.NoError(t, err)
	require.True(t, s.Committed)
	require.Equal(t, ota.SlotID(1), s.Active)
	require.Equal(t, uint64(3), s.Floor)

	require.NoError(t, r.l.Write(ctx, driver.Choice{Active: 0, Trial: true, Revert: 1, Tries: 2}))
	s, err = r.Load(ctx)
	require.NoError(t, err)
	require.False(t, s.Committed)
	require.Equal(t, 2, s.Tries)
	require.Equal(t, ota.SlotID(1), s.Revert)
}

// TestLoaderError: what cannot be read is not taken for absent.
func TestLoaderError(t *testing.T) {
	r := open(t, newChip(), false)
	ctx := t.Context()
	require.NoError(t, r.Store(ctx, ota.BootState{Committed: true, Revert: ota.NoSlot}))
	b, err := driver.New(failing{}, r, open(t, newChip(), false))
	require.NoError(t, err)
	_, err = b.Load(ctx)
	require.ErrorIs(t, err, errStop)
	require.ErrorIs(t, b.Store(ctx, ota.BootState{Active: 1, Committed: true, Revert: ota.NoSlot}), errStop)
	require.ErrorIs(t, b.Store(ctx, ota.BootState{Active: 1, Tries: 2}), ota.ErrInvalid)
}

type failing struct{}

func (failing) Running(context.Context) (ota.SlotID, error) { return 0, nil }
func (failing) Read(context.Context) (driver.Choice, error) { return driver.Choice{}, errStop }
func (failing) Write(context.Context, driver.Choice) error  { return errStop }
func (failing) Capabilities() driver.Capabilities           { return driver.Capabilities{MaxTries: 1} }
