package driver_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/loadertest"
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
	running func(context.Context) (ota.SlotID, error)
}

func (l *loader) Running(ctx context.Context) (ota.SlotID, error) { return l.running(ctx) }

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
func boot(ctx context.Context, flashes []ota.Flash) (ota.SlotID, error) {
	rec, err := bootrecord.New(flashes, nil)
	if err != nil {
		return ota.NoSlot, err
	}
	s, err := rec.Heal(ctx)
	switch {
	case errors.Is(err, ota.ErrNoBootState):
		return 0, nil
	case err != nil:
		return ota.NoSlot, err
	case s.Committed:
		return s.Active, nil
	case s.Tries == 0:
		return s.Revert, nil
	}
	s.Tries--
	s.Booted = true
	return s.Active, rec.Store(ctx, s)
}

func loaders() []loadertest.Loader {
	var ls []loadertest.Loader
	for _, oneShot := range []bool{false, true} {
		ls = append(ls, loadertest.Loader{
			Name:    fmt.Sprintf("one-shot-%v", oneShot),
			Flashes: slices.Repeat([]memflash.Config{{Size: 4096, EraseSize: 4096}}, 3),
			Open: func(flashes []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error) {
				rec, err := bootrecord.New(flashes, nil)
				return &loader{rec: rec, oneShot: oneShot, running: running}, err
			},
			Boot: boot,
		})
	}
	return ls
}

func TestConformance(t *testing.T) {
	for _, l := range loaders() {
		t.Run(l.Name, l.Conformance)
	}
}

func TestPowerCuts(t *testing.T) {
	for _, l := range loaders() {
		l.Replay, l.Twice = *replay, *long
		l.PowerCuts(t)
	}
}

var errStop = errors.New("stop")

// record returns a record in memory.
func record(t *testing.T) *bootrecord.Record {
	r, err := bootrecord.New(memflash.NewChip(slices.Repeat([]memflash.Config{{Size: 4096}}, 3)...).Flashes(), nil)
	require.NoError(t, err)
	return r
}

// TestForeignChange: another program has told the loader what to do.
func TestForeignChange(t *testing.T) {
	l := &loader{rec: record(t)}
	r, err := driver.New(l, record(t), record(t))
	require.NoError(t, err)
	ctx := t.Context()
	require.NoError(t, r.Store(ctx, ota.BootState{Committed: true, Revert: ota.NoSlot, Floor: 3}))
	require.NoError(t, l.Write(ctx, driver.Choice{Active: 1, Revert: ota.NoSlot}))
	s, err := r.Load(ctx)
	require.NoError(t, err)
	require.True(t, s.Committed)
	require.Equal(t, ota.SlotID(1), s.Active)
	require.Equal(t, uint64(3), s.Floor)

	require.NoError(t, l.Write(ctx, driver.Choice{Active: 0, Trial: true, Revert: 1, Tries: 2}))
	s, err = r.Load(ctx)
	require.NoError(t, err)
	require.False(t, s.Committed)
	require.Equal(t, 2, s.Tries)
	require.Equal(t, ota.SlotID(1), s.Revert)
}

// counting is a loader that counts every boot of slot 0.
type counting struct {
	driver.Driver
	c      driver.Choice
	writes int
	fail   error
}

func (l *counting) Running(context.Context) (ota.SlotID, error) { return 0, nil }
func (l *counting) Read(context.Context) (driver.Choice, error) { return l.c, nil }
func (l *counting) Write(_ context.Context, c driver.Choice) error {
	l.c = c
	l.writes++
	return l.fail
}

// TestFactory: boots of a device count before its first update, too.
func TestFactory(t *testing.T) {
	ctx := t.Context()
	heal := func(l *counting) error {
		b, err := driver.New(l, record(t), record(t))
		require.NoError(t, err)
		_, err = b.Heal(ctx)
		return err
	}
	l := &counting{c: driver.Choice{Revert: ota.NoSlot, Worn: true}}
	require.ErrorIs(t, heal(l), ota.ErrNoBootState)
	require.Equal(t, driver.Choice{Revert: ota.NoSlot}, l.c)
	require.ErrorIs(t, heal(l), ota.ErrNoBootState)
	require.Equal(t, 1, l.writes, "only what is worn is written")

	l = &counting{c: driver.Choice{Active: 1, Revert: ota.NoSlot, Worn: true}}
	require.ErrorIs(t, heal(l), ota.ErrNoBootState)
	require.Zero(t, l.writes, "slot 1 does not run")

	l = &counting{c: driver.Choice{Revert: ota.NoSlot, Worn: true}, fail: errStop}
	require.ErrorIs(t, heal(l), errStop)
}

// TestLoaderError: what cannot be read is not taken for absent.
func TestLoaderError(t *testing.T) {
	ctx := t.Context()
	b, err := driver.New(failing{}, record(t), record(t))
	require.NoError(t, err)
	_, err = b.Load(ctx)
	require.ErrorIs(t, err, errStop)
	require.ErrorIs(t, b.Store(ctx, ota.BootState{Active: 1, Committed: true, Revert: ota.NoSlot}), errStop)
	require.ErrorIs(t, b.Store(ctx, ota.BootState{Active: 1, Tries: 2}), ota.ErrInvalid)
	var slots []ota.Slot
	for range 2 {
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "app", Flash: memflash.New(memflash.Config{Size: 64})}}})
	}
	_, err = ota.Open(ctx, b, slots, &ota.Options{Tries: 2})
	require.ErrorContains(t, err, "can count to 1")
}

type failing struct{}

func (failing) Running(context.Context) (ota.SlotID, error) { return 0, nil }
func (failing) Read(context.Context) (driver.Choice, error) { return driver.Choice{}, errStop }
func (failing) Write(context.Context, driver.Choice) error  { return errStop }
func (failing) Capabilities() driver.Capabilities           { return driver.Capabilities{MaxTries: 1} }
