package ota_test

import (
	"context"
	"errors"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/stretchr/testify/require"
)

func TestBootOrder(t *testing.T) {
	d, err := sim.New(fileGeometry())
	require.NoError(t, err)
	for name, tc := range map[string]struct {
		o    ota.BootOptions
		ro   int
		slot ota.SlotID
		err  error
	}{
		"by number":       {ro: -1, slot: 0},
		"read-only first": {ro: 1, slot: 1},
		"as told":         {o: ota.BootOptions{Order: []ota.SlotID{1, 0}}, ro: -1, slot: 1},
		"checked":         {o: ota.BootOptions{Check: refuse(0)}, ro: -1, slot: 1},
		"none":            {o: ota.BootOptions{Check: refuse(0, 1)}, ro: -1, err: ota.ErrNotBootable},
		"unknown slot":    {o: ota.BootOptions{Order: []ota.SlotID{0, 2}}, ro: -1, err: ota.ErrUnknownSlot},
		"one slot":        {o: ota.BootOptions{Order: []ota.SlotID{0}}, ro: -1, err: ota.ErrInvalid},
		"slot twice":      {o: ota.BootOptions{Order: []ota.SlotID{0, 0}}, ro: -1, err: ota.ErrInvalid},
		"last slot twice": {o: ota.BootOptions{Order: []ota.SlotID{0, 1, 1}}, ro: -1, err: ota.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			slots := append([]ota.Slot(nil), d.Slots...)
			if tc.ro >= 0 {
				slots[tc.ro].ReadOnly = true
			}
			h, err := ota.Boot(t.Context(), d.Record, slots, &tc.o)
			require.ErrorIs(t, err, tc.err)
			if tc.err == nil {
				require.Equal(t, tc.slot, h.Slot)
				require.False(t, h.Verified)
			}
		})
	}
	require.Zero(t, d.Chip.Ops(), "nothing is stored")
}

var errRefused = errors.New("refused")

func refuse(ids ...ota.SlotID) func(context.Context, ota.SlotID) error {
	return func(_ context.Context, id ota.SlotID) error {
		for _, r := range ids {
			if r == id {
				return errRefused
			}
		}
		return nil
	}
}

// The caller's check decides like a digest does.
func TestBootCheck(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.update(2, 0)
	require.NoError(t, r.Restart())
	h, err := ota.Boot(t.Context(), r.Record, r.Slots, &ota.BootOptions{Check: refuse(1)})
	require.NoError(t, err)
	require.Equal(t, ota.SlotID(0), h.Slot)
	require.ErrorIs(t, h.Problem, errRefused)
	require.Equal(t, ota.ReasonVerify, h.State.Last.Reason)

	_, err = ota.Boot(t.Context(), r.Record, r.Slots, &ota.BootOptions{Check: refuse(0, 1)})
	require.ErrorIs(t, err, ota.ErrNotBootable)
	require.ErrorIs(t, err, errRefused)
}

// Lost state and no slot that is any good: an answer, not a loop.
func TestBootLostAndRefused(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	loseRecord(r)
	require.NoError(t, r.Restart())
	_, err := ota.Boot(t.Context(), r.Record, r.Slots, &ota.BootOptions{Check: refuse(0, 1)})
	require.ErrorIs(t, err, ota.ErrNotBootable)
	h, err := ota.Boot(t.Context(), r.Record, r.Slots, &ota.BootOptions{Check: refuse(0)})
	require.NoError(t, err)
	require.Equal(t, ota.SlotID(1), h.Slot)
}

// A trial that cannot be counted is not started; going back needs no writing.
func TestBootWithDeadRecord(t *testing.T) {
	dead := func(r *rig) {
		r.Chip.Plan(memflash.Fault{Kind: memflash.Fail, Forever: true, On: memflash.OpWrite | memflash.OpErase | memflash.OpSync})
	}
	r := newRig(t, sim.Geometries()[0], ota.Options{})
	r.install(2)
	r.boot()
	r.update(3, 0)
	dead(r)
	for range 3 {
		r.boot()
		require.Equal(t, 2, r.Identify(r.h.Slot))
		require.ErrorIs(t, r.h.Problem, memflash.ErrFault)
		require.False(t, r.h.State.Committed, "the trial is still to come")
		require.True(t, r.dev.Status().RebootPending)
	}
	r.Chip.Plan()
	r.boot()
	require.Equal(t, 3, r.Identify(r.h.Slot))
	dead(r)
	for range 3 {
		r.boot()
		require.Equal(t, 2, r.Identify(r.h.Slot), "the trial is over, stored or not")
		require.ErrorIs(t, r.dev.Status().Err, memflash.ErrFault)
	}

	// A committed firmware needs no writing at all.
	r.Chip.Plan()
	r.boot()
	dead(r)
	r.boot()
	require.NoError(t, r.h.Problem)
}

// stubborn is a boot loader that goes its own ways.
type stubborn struct {
	ota.Bootloader
	running ota.SlotID
	drop    bool // forgets what it is told
	load    error
}

func (s *stubborn) Running(context.Context) (ota.SlotID, error) { return s.running, nil }

func (s *stubborn) Load(ctx context.Context) (ota.BootState, error) {
	if s.load != nil {
		return ota.BootState{}, s.load
	}
	return s.Bootloader.Load(ctx)
}

func (s *stubborn) Store(ctx context.Context, st ota.BootState) error {
	if s.drop {
		return nil
	}
	return s.Bootloader.Store(ctx, st)
}

// What the boot loader fell back from is noticed, stored and reported.
func TestFallbackByBootloader(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	res := r.update(2, 0)
	r.boot() // the trial is counted
	b := &stubborn{Bootloader: r.Record, running: 0}
	dev, err := ota.Open(t.Context(), b, r.Slots, &r.o)
	require.NoError(t, err)
	s, err := dev.BootState(t.Context())
	require.NoError(t, err)
	require.Equal(t, ota.SlotID(0), s.Active)
	require.True(t, s.Committed)
	want := ota.Result{Outcome: ota.OutcomeReverted, Reason: ota.ReasonBootloader, Trial: res.Trial, Slot: 1}
	require.Equal(t, want, dev.Status().State.Last)
	require.Equal(t, want, r.stored().Last)
	require.ErrorIs(t, dev.CommitTrial(t.Context(), res.Trial), ota.ErrReverted)

	// The same for a committed firmware.
	r = newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	dev, err = ota.Open(t.Context(), &stubborn{Bootloader: r.Record, running: 0}, r.Slots, &r.o)
	require.NoError(t, err)
	require.Equal(t, ota.ReasonBootloader, dev.Status().State.Last.Reason)
	require.Equal(t, ota.SlotID(0), r.stored().Active)
	require.False(t, dev.Status().RebootPending)
}

// A store that is not there when it is read back has failed.
func TestStoreIsReadBack(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	b := &stubborn{Bootloader: r.Record, running: 1}
	dev, err := ota.Open(t.Context(), b, r.Slots, &r.o)
	require.NoError(t, err)
	b.drop = true
	_, err = dev.Update(t.Context(), &sim.Image{V: 3}, nil)
	require.ErrorIs(t, err, ota.ErrStateUnknown)
	s, err := dev.BootState(t.Context())
	require.NoError(t, err)
	require.True(t, s.Committed)

	// While it is not known what is stored nobody is told anything else.
	b.drop, b.load = false, errors.New("bus error")
	_, err = dev.Update(t.Context(), &sim.Image{V: 3}, nil)
	require.ErrorIs(t, err, b.load)
	_, err = dev.BootState(t.Context())
	require.ErrorIs(t, err, ota.ErrStateUnknown)
	require.ErrorIs(t, dev.Revert(t.Context()), ota.ErrStateUnknown)
	b.load = nil
	_, err = dev.Update(t.Context(), &sim.Image{V: 3}, nil)
	require.NoError(t, err)
}

// loseRecord damages every copy of the boot record.
func loseRecord(r *rig) {
	for i := range 3 {
		require.NoError(r.t, r.Chip.FlipBit(2*len(r.Slots)+i, 30, 1))
	}
}

// After a loss all slots are tried, not two of them.
func TestBootLostThreeSlots(t *testing.T) {
	g := fileGeometry()
	g.Slots = 3
	r := newRig(t, g, ota.Options{})
	r.install(2)
	loseRecord(r)
	for _, want := range []ota.SlotID{0, 1, 2, 0} {
		require.NoError(t, r.Restart())
		h, err := ota.Boot(t.Context(), r.Record, r.Slots, nil)
		require.NoError(t, err)
		require.Equal(t, want, h.Slot)
	}
	for range 2 {
		require.NoError(t, r.Restart())
		h, err := ota.Boot(t.Context(), r.Record, r.Slots, &ota.BootOptions{Check: refuse(0, 1)})
		require.NoError(t, err)
		require.Equal(t, ota.SlotID(2), h.Slot)
	}
}

// A record that is lost and cannot be written either stops nothing, and is still
// no commit.
func TestBootLostWithDeadRecord(t *testing.T) {
	for at := range 10 {
		r := newRig(t, fileGeometry(), ota.Options{})
		r.install(2)
		loseRecord(r)
		r.boot()
		r.Chip.Plan(memflash.Fault{Kind: memflash.Fail, At: r.Chip.Ops() + at, Forever: true})
		require.NoError(t, r.Restart())
		h, err := ota.Boot(t.Context(), r.Record, r.Slots, nil)
		require.NoError(t, err)
		r.Chip.Plan()
		r.Running = h.Slot
		dev, err := ota.Open(t.Context(), r.Record, r.Slots, &r.o)
		require.NoError(t, err)
		s, err := dev.BootState(t.Context())
		require.NoError(t, err)
		require.False(t, s.Committed)
		require.NoError(t, dev.Watch(t.Context()))
		s = r.stored()
		require.True(t, s.Committed)
		require.Equal(t, h.Slot, s.Active)
	}
}

// One bad read decides nothing.
func TestBootReadsAgain(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	r.boot()
	for _, k := range []memflash.Kind{memflash.Fail, memflash.Skip, memflash.Misdirect} {
		r.Chip.Plan(memflash.Fault{Kind: k, On: memflash.OpRead, Flash: 2, Len: 10})
		r.boot()
		require.Equal(t, ota.SlotID(1), r.h.Slot)
		require.Zero(t, r.Chip.Pending())
	}
	r.update(3, 0)
	r.Chip.Plan(memflash.Fault{Kind: memflash.Fail, On: memflash.OpRead, Len: 10})
	r.boot()
	require.Equal(t, 3, r.Identify(r.h.Slot))
}

// A record that cannot be read leaves the decision to a recovery system.
func TestBootUnreadableRecord(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	for i := range 3 {
		r.Chip.Plan(memflash.Fault{Kind: memflash.Fail, On: memflash.OpRead, Forever: true, Flash: 4 + i, Len: 4096})
		r.boot()
		require.Equal(t, ota.SlotID(1), r.h.Slot, "one of three")
	}
	var all []memflash.Fault
	for i := range 3 {
		all = append(all, memflash.Fault{Kind: memflash.Fail, On: memflash.OpRead, Forever: true, Flash: 4 + i, Len: 4096})
	}
	r.Chip.Plan(all...)
	_, _, err := r.Boot(t.Context(), &r.o)
	require.ErrorIs(t, err, ota.ErrNotBootable)
	require.ErrorIs(t, err, memflash.ErrFault)
	r.Chip.Plan()
	require.NoError(t, r.Record.Store(t.Context(), ota.BootState{Active: 6, Committed: true, Revert: ota.NoSlot}))
	_, _, err = r.Boot(t.Context(), &r.o)
	require.ErrorIs(t, err, ota.ErrNotBootable)
	require.ErrorIs(t, err, ota.ErrUnknownSlot)
}

// A boot that is called off decides nothing.
func TestBootCancelled(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	r.update(3, 0)
	before := r.stored()
	require.NoError(t, r.Restart())
	ctx, cancel := context.WithCancel(t.Context())
	r.Chip.OnOp(func(op memflash.Op) {
		if op.Flash == 0 {
			cancel()
		}
	})
	_, err := ota.Boot(ctx, r.Record, r.Slots, &ota.BootOptions{BufferSize: 64})
	require.ErrorIs(t, err, context.Canceled)
	r.Chip.OnOp(nil)
	require.True(t, r.stored().Equal(before))
	_, err = ota.Boot(ctx, r.Record, r.Slots, nil)
	require.ErrorIs(t, err, context.Canceled)
}

// The security floor holds at boot too, but not against going back.
func TestBootFloor(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	r.update(3, 0)
	s := r.stored()
	s.Floor = sim.Security(3) + 1
	require.NoError(t, r.Record.Store(t.Context(), s))
	r.boot()
	require.Equal(t, 2, r.Identify(r.h.Slot))
	require.ErrorIs(t, r.h.Problem, ota.ErrRollback)
	require.True(t, r.h.State.Committed)
}

// What takes the place of a damaged committed firmware was committed itself and
// never rejected.
func TestFallbackCandidates(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*ota.SlotState)
		ok     bool
	}{
		"approved": {func(*ota.SlotState) {}, true},
		"rejected": {func(s *ota.SlotState) { s.Rejected = true }, false},
		"untried":  {func(s *ota.SlotState) { s.Approved = false }, false},
		"too old":  {func(s *ota.SlotState) { s.Security = 1 }, false},
		"unknown":  {func(s *ota.SlotState) { s.Parts = nil }, false},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, fileGeometry(), ota.Options{})
			r.install(2)
			_, err := r.dev.CreateSnapshot(t.Context(), nil)
			require.NoError(t, err)
			s := r.stored()
			tc.change(&s.Slots[0])
			require.NoError(t, r.Record.Store(t.Context(), s))
			require.NoError(t, r.Chip.FlipBit(2, 9, 7))
			require.NoError(t, r.Restart())
			h, err := ota.Boot(t.Context(), r.Record, r.Slots, nil)
			if !tc.ok {
				require.ErrorIs(t, err, ota.ErrNotBootable)
				return
			}
			require.NoError(t, err)
			require.Equal(t, ota.SlotID(0), h.Slot)
		})
	}
}

// A trial that cannot be counted is not started in the guise of a reserve.
func TestBootUncountedTrial(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	_, err := r.dev.Update(t.Context(), &sim.Image{V: 3, Mutate: func(i *ota.ImageInfo) { i.Security = 2 }}, nil)
	require.NoError(t, err)
	r.boot()
	require.NoError(t, r.dev.Commit(t.Context()))
	require.NoError(t, r.dev.SetBootState(t.Context(), ota.BootStatePatch{Active: ptr(ota.SlotID(1))}))
	require.NoError(t, r.Chip.FlipBit(0, 9, 7))
	r.Chip.Plan(memflash.Fault{Kind: memflash.Fail, Forever: true})
	_, _, err = r.Boot(t.Context(), &r.o)
	require.ErrorIs(t, err, ota.ErrNotBootable)
}

// Before the boot step acts on the record, every copy holds it.
func TestBootHealsFirst(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	require.NoError(t, r.Chip.FlipBit(4, 40, 2))
	require.NoError(t, r.Restart())
	_, err := ota.Boot(t.Context(), r.Record, r.Slots, nil)
	require.NoError(t, err)
	for _, other := range []int{5, 6} {
		require.NoError(t, r.Chip.FlipBit(other, 40, 2))
	}
	require.Equal(t, ota.SlotID(1), r.stored().Active)
}
