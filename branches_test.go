package ota_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/stretchr/testify/require"
)

// A stored state without a revert slot has nothing to go back to.
func TestBootWithoutRevertSlot(t *testing.T) {
	for tries, dead := range map[int]bool{0: false, 1: true} {
		r := newRig(t, fileGeometry(), ota.Options{})
		r.update(2, 0)
		s := r.stored()
		s.Tries, s.Revert = tries, ota.NoSlot
		require.NoError(t, r.Record.Store(t.Context(), s))
		if dead {
			r.Chip.Plan(memflash.Fault{Kind: memflash.Fail, Forever: true}) // the boot cannot be counted
		}
		_, _, err := r.Boot(t.Context(), &r.o)
		require.ErrorIs(t, err, ota.ErrNotBootable)
	}
}

// A boot that is called off does not look for another firmware.
func TestBootCancelledWhileCommitted(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	_, err := r.dev.CreateSnapshot(t.Context(), nil)
	require.NoError(t, err)
	require.NoError(t, r.Restart())
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r.Chip.OnOp(func(op memflash.Op) {
		if op.Flash == 2 {
			cancel()
		}
		require.NotContains(t, []int{0, 1}, op.Flash)
	})
	_, err = ota.Boot(ctx, r.Record, r.Slots, &ota.BootOptions{BufferSize: 64})
	require.ErrorIs(t, err, context.Canceled)
	require.NotErrorIs(t, err, ota.ErrNotBootable)
}

// A record that describes more than the flash holds is no reason to read there.
func TestRecordBeyondTheFlash(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	_, err := r.dev.CreateSnapshot(t.Context(), nil)
	require.NoError(t, err)
	s := r.stored()
	s.Slots[1].Parts[0].Size = 1 << 40
	require.NoError(t, r.Record.Store(t.Context(), s))
	r.boot()
	require.Equal(t, ota.SlotID(0), r.h.Slot, "the snapshot takes over")
	require.ErrorIs(t, r.h.Problem, ota.ErrTooLarge)
}

func TestUnknownWords(t *testing.T) {
	require.Equal(t, "unknown (99)", ota.Outcome(99).String())
	require.Equal(t, "unknown (99)", ota.Reason(99).String())
	require.Equal(t, "unknown (99)", ota.Phase(99).String())
}

// What runs has to be measured before a trial; if that fails nothing changes.
func TestMeasuringFails(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	unreadable := memflash.Fault{Kind: memflash.Fail, On: memflash.OpRead, Flash: 0, Len: 1, Forever: true}
	r.Chip.Plan(unreadable)
	_, err := r.dev.CreateSnapshot(t.Context(), nil)
	require.ErrorIs(t, err, memflash.ErrFault)
	_, err = r.dev.Update(t.Context(), &sim.Image{V: 2}, nil)
	require.ErrorIs(t, err, memflash.ErrFault)
	var at *ota.Error
	require.ErrorAs(t, err, &at)
	require.Zero(t, at.Slot, "%v: it is the running slot that cannot be read", err)
	require.Zero(t, r.Chip.Ops())

	// Nor can it be copied once it was measured.
	r.Chip.Plan()
	r.update(2, 0)
	require.NoError(t, r.dev.Revert(t.Context()))
	r.Chip.Plan(unreadable)
	_, err = r.dev.CreateSnapshot(t.Context(), nil)
	require.ErrorIs(t, err, memflash.ErrFault)
	require.ErrorAs(t, err, &at)
	require.Zero(t, at.Slot, "%v: it is the running slot that cannot be read", err)

	// The other slot is verified, the running one was never measured.
	r.Chip.Plan()
	r.update(2, 0)
	s := r.state()
	require.NoError(t, r.dev.Revert(t.Context()))
	s.Active, s.Revert, s.Committed, s.Slots[0] = 0, ota.NoSlot, true, ota.SlotState{}
	require.NoError(t, r.Record.Store(t.Context(), s))
	r.boot()
	ops := r.Chip.Ops()
	r.Chip.Plan(unreadable)
	require.ErrorIs(t, r.dev.SetBootState(t.Context(), ota.BootStatePatch{Active: ptr(ota.SlotID(1))}), memflash.ErrFault)
	require.Equal(t, ops, r.Chip.Ops())
	require.True(t, r.state().Committed)
}

func TestSnapshotRefusals(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	_, err := r.dev.CreateSnapshot(t.Context(), &ota.SnapshotOptions{CommitTimeout: -1})
	require.ErrorIs(t, err, ota.ErrInvalid)
	r.Slots[1].ReadOnly = true
	dev, err := ota.Open(t.Context(), r.Record, r.Slots, &r.o)
	require.NoError(t, err)
	_, err = dev.CreateSnapshot(t.Context(), nil)
	require.ErrorIs(t, err, ota.ErrNoTarget)

	// The second look at a part that may change fails.
	r = newRig(t, fileGeometry(), ota.Options{})
	for i := range r.Slots {
		r.Slots[i].Parts[1].Mutable = true
	}
	r.o.OnEvent = func(e ota.Event) {
		if e.Phase == ota.PhaseVerifying && e.Slot == 1 && e.Part == "fs" && e.Done == e.Total {
			r.Chip.Plan(memflash.Fault{Kind: memflash.Fail, On: memflash.OpRead, Flash: 1, Len: 1, Forever: true})
		}
	}
	r.boot()
	_, err = r.dev.CreateSnapshot(t.Context(), nil)
	require.ErrorIs(t, err, memflash.ErrFault)
	var at *ota.Error
	require.ErrorAs(t, err, &at)
	require.Zero(t, at.Slot, "%v: it is the running slot that cannot be read", err)
	require.Empty(t, r.stored().Slot(1).Parts)
}

// Whatever somebody decides while a check fails is decided, at the last moment too: when
// Watch knows that it failed, and feeds the watchdog before it reverts. It makes no
// difference that the context ends right after that.
func TestDecidedWhileACheckFails(t *testing.T) {
	bad := errors.New("bad")
	for name, tc := range map[string]struct {
		decide func(*testing.T, *ota.Device)
		want   error
	}{
		"committed": {func(t *testing.T, d *ota.Device) { require.NoError(t, d.Commit(t.Context())) }, nil},
		"reverted":  {func(t *testing.T, d *ota.Device) { require.NoError(t, d.Revert(t.Context())) }, ota.ErrReverted},
		"committed, and being updated": {func(t *testing.T, d *ota.Device) {
			require.NoError(t, d.Commit(t.Context()))
			ctx, cancel := context.WithCancel(t.Context())
			reading, done := make(chan struct{}), make(chan struct{})
			t.Cleanup(func() { cancel(); <-done })
			stuck := func(string, io.Reader) io.Reader { close(reading); return untilDone{ctx} }
			go func() {
				defer close(done)
				_, err := d.Update(ctx, &sim.Image{V: 3, Wrap: stuck}, nil)
				if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			}()
			<-reading
		}, nil},
	} {
		for _, when := range []struct{ late, end bool }{{}, {late: true}, {end: true}, {true, true}} {
			t.Run(fmt.Sprintf("%s, %+v", name, when), func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				resets := 0
				var dev *ota.Device
				var decide func() // nil unless it is time
				now := func() {
					tc.decide(t, dev)
					if when.end {
						cancel()
					}
				}
				w := &fedBy{dog: dog{timeout: time.Hour}, fed: func() {
					if f := decide; f != nil {
						decide = nil
						f()
					}
				}}
				o := ota.Options{
					Reset:    func(context.Context) error { resets++; return nil },
					Watchdog: func(context.Context) (ota.Watchdog, error) { return w, nil },
					Checks: []ota.Check{{Name: "c", Run: func(context.Context) error {
						if when.late {
							decide = now
						} else {
							now()
						}
						return bad
					}}},
				}
				r := newRig(t, fileGeometry(), o)
				r.update(2, 0)
				r.boot()
				dev = r.dev
				err := dev.Watch(ctx)
				require.ErrorIs(t, err, tc.want)
				require.NotErrorIs(t, err, bad)
				require.Nil(t, decide, "the watchdog was not fed before the revert")
				require.Zero(t, resets, "who decided reboots")
				require.Equal(t, tc.want == nil, r.stored().Last.Outcome == ota.OutcomeCommitted)
				require.Equal(t, tc.want == nil, w.disarmed == 1)
			})
		}
	}
}

// fedBy is a watchdog that says when it is fed.
type fedBy struct {
	dog
	fed func()
}

func (w *fedBy) Keepalive(ctx context.Context) error {
	w.fed()
	return w.dog.Keepalive(ctx)
}

// After a loss there is nowhere to go back to if a check fails.
func TestCheckFailsAfterLoss(t *testing.T) {
	bad := errors.New("bad")
	r := newRig(t, fileGeometry(), ota.Options{Checks: []ota.Check{{Name: "c", Run: func(context.Context) error { return bad }}}})
	r.install(2)
	loseRecord(r)
	dev, err := ota.Open(t.Context(), r.Record, r.Slots, &r.o)
	require.NoError(t, err)
	err = dev.Watch(t.Context())
	require.ErrorIs(t, err, bad)
	require.ErrorIs(t, err, ota.ErrNoRevert)
}

// A check is not begun without knowing how much time it has.
func TestCheckWithoutClock(t *testing.T) {
	broken := errors.New("no clock")
	r := newRig(t, fileGeometry(), ota.Options{
		Reset:     func(context.Context) error { return nil },
		BootClock: func() (time.Duration, error) { return 0, broken },
		Checks:    []ota.Check{{Name: "c", Run: func(context.Context) error { t.Error("it ran"); return nil }}},
	})
	r.update(2, time.Minute)
	r.boot()
	require.ErrorIs(t, r.dev.Watch(t.Context()), broken)
	require.Equal(t, ota.ReasonTimeout, r.stored().Last.Reason)
}

func TestOpenFails(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.update(2, 0)
	r.boot() // counted
	lost := errors.New("which one?")
	_, err := ota.Open(t.Context(), running{r.Record, func() (ota.SlotID, error) { return 0, lost }}, r.Slots, &r.o)
	require.ErrorIs(t, err, lost)

	// A fallback is to be stored, and the context ends.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r.Chip.OnOp(func(op memflash.Op) {
		if op.Kind != memflash.OpRead {
			cancel()
		}
	})
	_, err = ota.Open(ctx, running{r.Record, func() (ota.SlotID, error) { return 0, nil }}, r.Slots, &r.o)
	require.ErrorIs(t, err, context.Canceled)
}

// running is a boot loader that finds out by itself what runs.
type running struct {
	ota.Bootloader
	is func() (ota.SlotID, error)
}

func (b running) Running(context.Context) (ota.SlotID, error) { return b.is() }

// Who waits for a store gives up with its context.
func TestWaitingIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, fileGeometry(), ota.Options{})
		r.update(2, 0)
		r.boot()
		r.Chip.Plan(memflash.Fault{Kind: memflash.Slow, On: memflash.OpWrite, Flash: 4, Len: 1, Delay: time.Minute})
		done := make(chan error)
		go func() { done <- r.dev.Commit(context.Background()) }()
		synctest.Wait()
		require.Equal(t, "commit", r.dev.Status().Busy)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, r.dev.Revert(ctx), context.DeadlineExceeded)
		require.NoError(t, <-done)
		require.ErrorIs(t, r.dev.Revert(t.Context()), ota.ErrCommitted)
	})
}

// An update is given up while what is in place is verified.
func TestGivenUpWhileVerifying(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r := newRig(t, fileGeometry(), ota.Options{BufferSize: 64})
	r.update(2, 0)
	require.NoError(t, r.dev.Revert(t.Context()))
	before := r.stored()
	r.Chip.OnOp(func(memflash.Op) { cancel() })
	_, err := r.dev.Update(ctx, &sim.Image{V: 2}, nil)
	require.ErrorIs(t, err, context.Canceled)
	require.True(t, r.stored().Equal(before))
}

// list is an image whose parts come as given, whatever its description says.
type list struct {
	sim.Image
	parts []*ota.ImagePart
}

func (l *list) Next(context.Context) (*ota.ImagePart, error) {
	if len(l.parts) == 0 {
		return nil, io.EOF
	}
	p := l.parts[0]
	l.parts = l.parts[1:]
	return p, nil
}

// An image that does not yield what it describes is refused, and what it yields
// beside that is passed over.
func TestPartsAgainstDescription(t *testing.T) {
	part := func(name string) *ota.ImagePart {
		b := sim.Content(2, name)
		return &ota.ImagePart{PartInfo: ota.PartInfo{Name: name, Size: int64(len(b))}, Data: bytes.NewReader(b)}
	}
	other := part("app")
	other.Name = "other"
	longer := part("app")
	longer.Size++
	for name, tc := range map[string]struct {
		parts []*ota.ImagePart
		want  error
	}{
		"another order":  {[]*ota.ImagePart{part("fs"), part("app")}, nil},
		"one more":       {[]*ota.ImagePart{part("app"), other, part("fs")}, nil},
		"twice":          {[]*ota.ImagePart{part("app"), part("app"), part("fs")}, ota.ErrInvalid},
		"another size":   {[]*ota.ImagePart{longer, part("fs")}, ota.ErrInvalid},
		"one is missing": {[]*ota.ImagePart{part("app")}, ota.ErrIncomplete},
		"none":           {nil, ota.ErrIncomplete},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, fileGeometry(), ota.Options{})
			_, err := r.dev.Update(t.Context(), &list{Image: sim.Image{V: 2}, parts: tc.parts}, nil)
			require.ErrorIs(t, err, tc.want)
			require.Equal(t, tc.want != nil, r.state().Committed)
		})
	}
}

// A version that is too long is cut between characters.
func TestLongVersion(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	_, err := r.dev.Update(t.Context(), &sim.Image{V: 2, Mutate: func(i *ota.ImageInfo) {
		i.Version = strings.Repeat("x", ota.MaxVersion-1) + "é"
	}}, nil)
	require.NoError(t, err)
	require.Equal(t, strings.Repeat("x", ota.MaxVersion-1), r.stored().Slot(1).Version)
}

// flash has no optional methods but those that are given.
type flash struct{ ota.Flash }

// plainEraser is a flash with erase units of one size.
type plainEraser struct {
	flash
	ota.Eraser
	unit int64
}

func (f plainEraser) EraseSize() int64 { return f.unit }

func TestEraseUnit(t *testing.T) {
	f := memflash.New(memflash.Config{Size: 10 << 10, EraseSize: 2 << 10})
	plain := plainEraser{flash{f}, f.(ota.Eraser), 4096}
	for off, want := range map[int64][2]int64{0: {0, 4096}, 4095: {0, 4096}, 4096: {4096, 4096}, 8192: {8192, 2048}} {
		start, n := ota.EraseUnit(plain, off)
		require.Equal(t, want, [2]int64{start, n}, "at %d", off)
	}
	plain.unit = 0
	for _, f := range []ota.Flash{plain, flash{f}} {
		_, n := ota.EraseUnit(f, 5)
		require.Zero(t, n)
	}
}

// wayward is a flash that breaks its contract.
type wayward struct {
	flash
	read, write func(p []byte, off int64) (int, error)
}

func (f wayward) ReadAt(p []byte, off int64) (int, error)  { return f.read(p, off) }
func (f wayward) WriteAt(p []byte, off int64) (int, error) { return f.write(p, off) }

// crooked has erase units that overlap.
type crooked struct{ plainEraser }

func (crooked) EraseUnit(off int64) (start, n int64) { return max(0, off-1), 4096 }

// A flash that breaks its contract fails the update, and nothing else.
func TestFlashBreaksItsContract(t *testing.T) {
	for name, tc := range map[string]struct {
		g    sim.Geometry
		wrap func(ota.Flash) ota.Flash
		want error
	}{
		"writes less": {fileGeometry(), func(f ota.Flash) ota.Flash {
			return wayward{flash{f}, f.ReadAt, func(p []byte, off int64) (int, error) { return f.WriteAt(p[:len(p)-1], off) }}
		}, io.ErrShortWrite},
		"reads less": {fileGeometry(), func(f ota.Flash) ota.Flash {
			return wayward{flash{f}, func(p []byte, off int64) (int, error) { return f.ReadAt(p[:len(p)-1], off) }, f.WriteAt}
		}, io.ErrUnexpectedEOF},
		"crooked units": {sim.Geometries()[0], func(f ota.Flash) ota.Flash {
			return crooked{plainEraser{flash{f}, f.(ota.Eraser), 4096}}
		}, ota.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, tc.g, ota.Options{})
			r.install(2)
			r.Slots[0].Parts[0].Flash = tc.wrap(r.Slots[0].Parts[0].Flash)
			r.boot()
			_, err := r.dev.Update(t.Context(), &sim.Image{V: 3}, nil)
			require.ErrorIs(t, err, tc.want)
			require.True(t, r.stored().Committed)
		})
	}
}

// A buffer smaller than a write unit is made as large.
func TestSmallBuffer(t *testing.T) {
	for _, g := range sim.Geometries() {
		r := newRig(t, g, ota.Options{BufferSize: 1})
		r.install(2)
		require.Equal(t, 2, r.Identify(1), g.Name)
	}
}

// stride is how far apart the operations are that a sweep strikes.
func stride() int {
	if raceEnabled {
		return 7
	}
	return 1
}

// An update in chunks can be called off at every operation of the flash, reading
// included. The device is as it was, and can be updated.
func TestChunksCalledOffAnywhere(t *testing.T) {
	const size, chunk = 128 << 10, 256 // more chunks than are tried as a sample
	for _, cfg := range []memflash.Config{{Size: size + 8<<10}, {Size: size + 8<<10, EraseSize: 4 << 10}} {
		v1 := random(1, size)
		v2 := slices.Concat(v1[5*chunk:], v1[:5*chunk]) // moved
		copy(v2[50*chunk:], random(2, chunk))
		d := newTarget(t, cfg, ota.Options{BufferSize: 8 << 10})
		d.fill(0, v1, cfg)
		for n, done := 0, false; !done; n += stride() {
			d.fill(1, v2[:size/2], cfg)
			d.open()
			ctx, cancel := context.WithCancel(t.Context())
			var ops atomic.Int64
			d.chip.OnOp(func(memflash.Op) {
				if ops.Add(1) > int64(n) {
					cancel()
				}
			})
			_, err := d.dev.Update(ctx, &chunked{content: v2, size: chunk}, nil)
			cancel()
			d.chip.OnOp(nil)
			if done = err == nil; done {
				require.Greater(t, n, 50)
				require.NoError(t, d.dev.Revert(t.Context()))
				break
			}
			require.ErrorIs(t, err, context.Canceled, "operation %d", n)
			s, err := d.dev.BootState(t.Context())
			require.NoError(t, err)
			require.True(t, s.Committed && s.Active == 0, "operation %d: %+v", n, s)
		}
		d.update(&chunked{content: v2, size: chunk})
	}
}

// Where chunks cannot be read they are fetched, or the update fails; what is
// installed is right in any case.
func TestChunksUnreadable(t *testing.T) {
	const size, chunk = 128 << 10, 256 // more chunks than are tried as a sample
	cfg := memflash.Config{Size: size}
	v1 := random(1, size)
	v2 := slices.Concat(v1[5*chunk:], v1[:5*chunk])
	good, failed := 0, 0
	for n, done := 0, false; !done; n += stride() {
		d := newTarget(t, cfg, ota.Options{BufferSize: 8 << 10})
		d.fill(0, v1, cfg)
		d.fill(1, v2[:size/2], cfg)
		var reads atomic.Int64
		failing := func(f ota.Flash) ota.Flash {
			return wayward{flash{f}, func(p []byte, off int64) (int, error) {
				if reads.Add(1) == int64(n+1) {
					return 0, memflash.ErrFault
				}
				return f.ReadAt(p, off)
			}, f.WriteAt}
		}
		f := d.chip.Flashes()
		record, err := bootrecord.New(f[2:], &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
		require.NoError(t, err)
		d.dev, err = ota.Open(t.Context(), record, []ota.Slot{
			{Parts: []ota.Part{{Name: "app", Flash: failing(f[0])}}}, {Parts: []ota.Part{{Name: "app", Flash: failing(f[1])}}},
		}, &d.o)
		require.NoError(t, err)
		if _, err = d.try(&chunked{content: v2, size: chunk}); err == nil {
			good++
		} else {
			require.ErrorIs(t, err, memflash.ErrFault, "read %d", n)
			failed++
		}
		done = reads.Load() <= int64(n)
	}
	require.Greater(t, good, 1)
	require.Positive(t, failed)
}

// unselectable is data that nothing can be selected from, though it says so.
type unselectable struct{ io.Reader }

func (unselectable) Select([]ota.Range) error { return errCut }

// Data of a part that is in place and cannot be passed over fail the update.
func TestCannotPassOver(t *testing.T) {
	d := newTarget(t, memflash.Config{Size: 8 << 10}, ota.Options{})
	img := func() *chunked { return &chunked{content: random(1, 8<<10), size: 1 << 10} }
	d.update(img())
	_, err := d.dev.Update(t.Context(), &wrapped{img(), func(_ context.Context, r io.Reader) io.Reader { return unselectable{r} }}, nil)
	require.ErrorIs(t, err, errCut)
}

// oversized says that its erase units are small, and has a large one.
type oversized struct{ plainEraser }

func (f oversized) EraseUnit(int64) (start, n int64) { return 0, f.Size() }

func TestEraseUnitsContradictEraseSize(t *testing.T) {
	for _, chunk := range []int64{0, 1 << 10} {
		cfg := memflash.Config{Size: 64 << 10, EraseSize: 4 << 10}
		d := newTarget(t, cfg, ota.Options{BufferSize: 8 << 10})
		d.wrap = func(f ota.Flash) ota.Flash { return oversized{plainEraser{flash{f}, f.(ota.Eraser), 4 << 10}} }
		d.open()
		_, err := d.dev.Update(t.Context(), &chunked{content: random(1, 20<<10), size: chunk}, nil)
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
}

// A region of a medium that is written in sequence is, too.
func TestRegionWritesInSequence(t *testing.T) {
	f := memflash.New(memflash.Config{Size: 8 << 10})
	for want, f := range map[bool]ota.Flash{false: f, true: &inSequence{spy: &spy{f, func([]byte, int64) {}}}} {
		r, err := ota.Region(f, 0, 4<<10)
		require.NoError(t, err)
		require.Equal(t, want, r.(ota.SequentialWriter).WritesInSequence())
	}
}

// mad is a watchdog that cannot be called off.
type mad struct{ *dog }

func (mad) Disarm(context.Context) error { return errors.New("no way out") }
func (mad) Close() error                 { return errors.New("stuck") }

// A commit counts also if the watchdog cannot be called off; that is logged.
func TestWatchdogCannotBeDisarmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		r, resets := onTrial(t, 0, ota.Options{
			Logger:   slog.New(slog.NewTextHandler(&log, nil)),
			Watchdog: func(context.Context) (ota.Watchdog, error) { return mad{&dog{timeout: time.Minute}}, nil },
		})
		require.NoError(t, r.dev.Watch(t.Context()))
		require.True(t, r.stored().Committed)
		require.Zero(t, *resets)
		require.Contains(t, log.String(), "no way out")
		require.Contains(t, log.String(), "stuck")
	})
}
