package ota_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/stretchr/testify/require"
)

// fileGeometry needs no erasing.
func fileGeometry() sim.Geometry {
	gs := sim.Geometries()
	return gs[len(gs)-1]
}

// rig is a device under test, booted.
type rig struct {
	*sim.Device
	t   *testing.T
	o   ota.Options
	dev *ota.Device
	h   ota.Handover
}

func newRig(t *testing.T, g sim.Geometry, o ota.Options) *rig {
	d, err := sim.New(g)
	require.NoError(t, err)
	r := &rig{Device: d, t: t, o: o}
	r.boot()
	return r
}

func (r *rig) boot() {
	r.t.Helper()
	r.o.Platform, r.o.Product = "sim", "demo"
	var err error
	r.dev, r.h, err = r.Boot(r.t.Context(), &r.o)
	require.NoError(r.t, err)
	require.NotZero(r.t, r.Identify(r.h.Slot))
}

func (r *rig) update(v int, timeout time.Duration) ota.UpdateResult {
	r.t.Helper()
	res, err := r.dev.Update(r.t.Context(), &sim.Image{V: v}, &ota.UpdateOptions{CommitTimeout: timeout})
	require.NoError(r.t, err)
	return res
}

// install leaves version v running and committed.
func (r *rig) install(v int) {
	r.t.Helper()
	r.update(v, 0)
	r.boot()
	require.NoError(r.t, r.dev.Commit(r.t.Context()))
}

func (r *rig) state() ota.BootState {
	r.t.Helper()
	s, err := r.dev.BootState(r.t.Context())
	require.NoError(r.t, err)
	return s
}

// stored returns the state as a fresh reader finds it.
func (r *rig) stored() ota.BootState {
	r.t.Helper()
	s, err := r.Record.Load(r.t.Context())
	require.NoError(r.t, err)
	return s
}

func stateJSON(t *testing.T, s ota.BootState) string {
	b, err := json.Marshal(s)
	require.NoError(t, err)
	return string(b)
}

func TestUpdateCommit(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{BootClock: func() (time.Duration, error) { return time.Second, nil }})
	require.Equal(t, `{"active_slot":0,"is_committed":true,"revert_slot":-1,"commit_timeout":0}`, stateJSON(t, r.state()))
	require.False(t, r.h.Verified, "the factory image was never measured")

	res := r.update(2, 90*time.Second)
	require.Equal(t, ota.SlotID(1), res.Slot)
	require.NotZero(t, res.Trial)
	require.Equal(t, `{"active_slot":1,"is_committed":false,"revert_slot":0,"commit_timeout":90}`, stateJSON(t, r.state()))
	require.True(t, r.stored().Equal(r.state()))
	require.True(t, r.dev.Status().RebootPending)
	require.False(t, r.dev.Status().Trial)

	r.boot()
	require.Equal(t, ota.SlotID(1), r.h.Slot)
	require.True(t, r.h.FirstBoot)
	require.True(t, r.h.Verified)
	require.True(t, r.dev.Status().Trial)
	require.NoError(t, r.dev.Commit(t.Context()))
	s := r.stored()
	require.Equal(t, `{"active_slot":1,"is_committed":true,"revert_slot":-1,"commit_timeout":0}`, stateJSON(t, s))
	require.Equal(t, sim.Security(2), s.Floor)
	require.Equal(t, ota.Result{Outcome: ota.OutcomeCommitted, Trial: res.Trial, Slot: 1}, s.Last)
	require.True(t, s.Slot(0).Approved, "the factory image was measured before the trial")
	require.Equal(t, "2.0", s.Slot(1).Version)

	for range 5 {
		ops := r.Chip.Ops()
		r.boot()
		require.Equal(t, ota.SlotID(1), r.h.Slot)
		require.False(t, r.h.FirstBoot)
		require.Equal(t, ops, r.Chip.Ops(), "the boot of a committed firmware writes nothing")
	}
}

func TestResetBeforeCommitReverts(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	res := r.update(2, 0)
	r.boot()
	r.boot()
	require.Equal(t, ota.SlotID(0), r.h.Slot)
	require.True(t, r.h.Verified)
	require.Equal(t, ota.Result{Outcome: ota.OutcomeReverted, Reason: ota.ReasonReset, Trial: res.Trial, Slot: 1}, r.state().Last)
	require.True(t, r.state().Committed)
	require.True(t, r.state().Slot(1).Rejected)
	require.ErrorIs(t, r.dev.Commit(t.Context()), ota.ErrCommitted)
	require.ErrorIs(t, r.dev.CommitTrial(t.Context(), res.Trial), ota.ErrReverted)
}

func TestSeveralTries(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{Tries: 3})
	r.update(2, 0)
	for i := range 3 {
		r.boot()
		require.Equal(t, ota.SlotID(1), r.h.Slot)
		require.Equal(t, i == 0, r.h.FirstBoot)
	}
	r.boot()
	require.Equal(t, ota.SlotID(0), r.h.Slot)
}

func TestRevert(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	require.ErrorIs(t, r.dev.Revert(t.Context()), ota.ErrCommitted)
	r.update(2, 0)
	r.boot()
	require.NoError(t, r.dev.Revert(t.Context()))
	require.ErrorIs(t, r.dev.Revert(t.Context()), ota.ErrReverted)
	require.ErrorIs(t, r.dev.Commit(t.Context()), ota.ErrReverted)
	_, err := r.dev.Update(t.Context(), &sim.Image{V: 3}, nil)
	require.ErrorIs(t, err, ota.ErrRebootPending)

	// The daemon may restart before the device does.
	dev, err := ota.Open(t.Context(), r.Record, r.Slots, &r.o)
	require.NoError(t, err)
	require.ErrorIs(t, dev.Commit(t.Context()), ota.ErrReverted)
	require.True(t, dev.Status().RebootPending)

	r.boot()
	require.Equal(t, ota.SlotID(0), r.h.Slot)
	require.Equal(t, ota.ReasonRequested, r.dev.Status().State.Last.Reason)
}

func TestRevertCallsOffTrial(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.update(2, 0)
	_, err := r.dev.Update(t.Context(), &sim.Image{V: 3}, nil)
	require.ErrorIs(t, err, ota.ErrNotCommitted)
	require.ErrorIs(t, r.dev.Commit(t.Context()), ota.ErrRebootPending, "a commit is for what runs")
	require.NoError(t, r.dev.Revert(t.Context()))
	require.False(t, r.state().Slot(1).Rejected, "it never ran")
	r.update(3, 0)
	r.boot()
	require.Equal(t, 3, r.Identify(r.h.Slot))
}

func TestCommitTrial(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{RequireTrialID: true})
	old := r.update(2, 0).Trial
	r.boot()
	r.boot() // reverted
	res := r.update(2, 0)
	require.NotEqual(t, old, res.Trial)
	require.Equal(t, int64(0), res.Written, "the rejected image is still in place")
	r.boot()
	require.ErrorIs(t, r.dev.CommitTrial(t.Context(), old), ota.ErrWrongTrial, "meant for an earlier trial of the same image")
	require.ErrorIs(t, r.dev.Commit(t.Context()), ota.ErrWrongTrial)
	require.ErrorIs(t, r.dev.CommitTrial(t.Context(), ota.TrialID{}), ota.ErrWrongTrial)
	require.False(t, r.stored().Committed)
	require.NoError(t, r.dev.CommitTrial(t.Context(), res.Trial))
	require.NoError(t, r.dev.CommitTrial(t.Context(), res.Trial), "a duplicate")
	require.True(t, r.stored().Committed)
}

// Whatever is refused leaves everything as it was, down to the last byte.
func TestUpdateRefusals(t *testing.T) {
	big := func(i *ota.ImageInfo) { i.Parts[0].Size = 1 << 20 }
	for name, tc := range map[string]struct {
		img  sim.Image
		o    ota.UpdateOptions
		want error
	}{
		"not authenticated":      {img: sim.Image{V: 3, Mutate: func(i *ota.ImageInfo) { i.SignedBy = nil }}, want: ota.ErrUnverified},
		"platform prefix":        {img: sim.Image{V: 3, Mutate: func(i *ota.ImageInfo) { i.Platform = "simx" }}, want: ota.ErrPlatform},
		"platform case":          {img: sim.Image{V: 3, Mutate: func(i *ota.ImageInfo) { i.Platform = "Sim" }}, want: ota.ErrPlatform},
		"no platform":            {img: sim.Image{V: 3, Mutate: func(i *ota.ImageInfo) { i.Platform = "" }}, want: ota.ErrPlatform},
		"product":                {img: sim.Image{V: 3, Mutate: func(i *ota.ImageInfo) { i.Name = "other" }}, want: ota.ErrProduct},
		"security version":       {img: sim.Image{V: 1}, want: ota.ErrRollback},
		"security step":          {img: sim.Image{V: 8}, want: ota.ErrStep},
		"step of the signers":    {img: sim.Image{V: 3, Mutate: func(i *ota.ImageInfo) { i.Security += 2; i.SecurityStep = 2 }}, want: ota.ErrStep},
		"no space":               {img: sim.Image{V: 3, Mutate: big}, want: ota.ErrTooLarge},
		"4 GiB":                  {img: sim.Image{V: 3, Mutate: func(i *ota.ImageInfo) { i.Parts[1].Size = 1 << 32 }}, want: ota.ErrTooLarge},
		"largest size":           {img: sim.Image{V: 3, Mutate: func(i *ota.ImageInfo) { i.Parts[1].Size = 1<<63 - 1 }}, want: ota.ErrTooLarge},
		"negative size":          {img: sim.Image{V: 3, Mutate: func(i *ota.ImageInfo) { i.Parts[1].Size = -1 }}, want: ota.ErrTooLarge},
		"part missing":           {img: sim.Image{V: 3, Mutate: func(i *ota.ImageInfo) { i.Parts = i.Parts[:1] }}, want: ota.ErrIncomplete},
		"part twice":             {img: sim.Image{V: 3, Mutate: func(i *ota.ImageInfo) { i.Parts[1] = i.Parts[0] }}, want: ota.ErrInvalid},
		"commit timeout":         {img: sim.Image{V: 3}, o: ota.UpdateOptions{CommitTimeout: -1}, want: ota.ErrInvalid},
		"commit timeout too big": {img: sim.Image{V: 3}, o: ota.UpdateOptions{CommitTimeout: ota.MaxCommitTimeout + 1}, want: ota.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, fileGeometry(), ota.Options{SecurityStep: 4})
			r.install(2)
			before, chip := r.stored(), r.Chip.Clone()
			res, err := r.dev.Update(t.Context(), &tc.img, &tc.o)
			require.ErrorIs(t, err, tc.want)
			var e *ota.Error
			require.ErrorAs(t, err, &e)
			require.Equal(t, "update", e.Op)
			require.Equal(t, ota.UpdateResult{Slot: ota.NoSlot}, res)
			require.True(t, r.Chip.Equal(chip), "flash was touched")
			require.True(t, r.stored().Equal(before))
		})
	}
}

// What goes wrong while the image is read costs the target slot at most.
func TestUpdateFailures(t *testing.T) {
	broken := errors.New("broken")
	for name, tc := range map[string]struct {
		wrap func(string, io.Reader) io.Reader
		want error
	}{
		"shorter":     {func(_ string, r io.Reader) io.Reader { return io.LimitReader(r, 100) }, ota.ErrTooSmall},
		"empty":       {func(_ string, r io.Reader) io.Reader { return strings.NewReader("") }, ota.ErrTooSmall},
		"longer":      {func(_ string, r io.Reader) io.Reader { return io.MultiReader(r, strings.NewReader("x")) }, ota.ErrTooLarge},
		"other bytes": {func(p string, r io.Reader) io.Reader { return bytes.NewReader(make([]byte, len(sim.Content(3, p)))) }, ota.ErrDigest},
		"read error": {func(_ string, r io.Reader) io.Reader {
			return io.MultiReader(io.LimitReader(r, 1500), errReader{broken})
		}, broken},
		"error at end": {func(_ string, r io.Reader) io.Reader { return io.MultiReader(r, errReader{broken}) }, broken},
		"second part": {func(p string, r io.Reader) io.Reader {
			if p == "fs" {
				return errReader{broken}
			}
			return r
		}, broken},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, sim.Geometries()[0], ota.Options{BufferSize: 512})
			r.install(2)
			before := stateJSON(t, r.state())
			_, err := r.dev.Update(t.Context(), &sim.Image{V: 3, Wrap: tc.wrap}, nil)
			require.ErrorIs(t, err, tc.want)
			var e *ota.Error
			require.ErrorAs(t, err, &e)
			require.Equal(t, ota.SlotID(0), e.Slot)
			require.NotEmpty(t, e.Part)
			require.Equal(t, before, stateJSON(t, r.state()))
			require.Empty(t, r.state().Slot(0).Parts, "the slot says that it holds nothing")
			require.ErrorIs(t, r.dev.Status().Err, tc.want)
			require.Equal(t, ota.PhaseFailed, r.dev.Status().Event.Phase)

			r.boot()
			require.Equal(t, 2, r.Identify(r.h.Slot))
			r.install(3)
			require.Equal(t, 3, r.Identify(r.h.Slot))
		})
	}
}

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }

// A context that ends at any operation ends the update, and nothing else.
func TestUpdateCancelled(t *testing.T) {
	r := newRig(t, sim.Geometries()[0], ota.Options{BufferSize: 512})
	r.install(2)
	cancelled := 0
	for at := 0; ; at++ {
		c, err := r.Clone()
		require.NoError(t, err)
		x := &rig{Device: c, t: t, o: r.o}
		x.boot()
		ctx, cancel := context.WithCancel(t.Context())
		n := 0
		x.Chip.OnOp(func(memflash.Op) {
			if n == at {
				cancel()
			}
			n++
		})
		_, err = x.dev.Update(ctx, &sim.Image{V: 3}, nil)
		cancel()
		x.Chip.OnOp(nil)
		if n <= at {
			require.NoError(t, err)
			break
		}
		if err != nil {
			require.ErrorIs(t, err, context.Canceled)
			require.True(t, x.state().Committed)
			require.Equal(t, ota.SlotID(1), x.state().Active)
			cancelled++
		} else {
			require.False(t, x.state().Committed)
		}
		require.True(t, x.stored().Equal(x.state()))
		x.boot()
		want := 2
		if err == nil {
			want = 3
		}
		require.Equal(t, want, x.Identify(x.h.Slot))
	}
	require.Greater(t, cancelled, 20)
}

// An image in place is not written again, after its bytes were checked.
func TestSkipsWhatIsInPlace(t *testing.T) {
	var skipped []string
	o := ota.Options{OnEvent: func(e ota.Event) {
		if e.Skipped {
			skipped = append(skipped, e.Part)
		}
	}}
	r := newRig(t, sim.Geometries()[0], o)
	r.install(2)
	r.update(3, 0)
	r.boot()
	require.NoError(t, r.dev.Revert(t.Context()))
	r.boot()
	require.Empty(t, skipped)

	wear := r.Chip.Wear(0)
	res := r.update(3, 0)
	require.Equal(t, int64(0), res.Written)
	require.Equal(t, int64(len(sim.Content(3, "app"))+len(sim.Content(3, "fs"))), res.Skipped)
	require.Equal(t, []string{"app", "fs"}, skipped)
	require.Equal(t, wear, r.Chip.Wear(0))
	r.boot()
	require.Equal(t, 3, r.Identify(r.h.Slot))
	require.NoError(t, r.dev.Revert(t.Context()))
	r.boot()

	// One part has rotted.
	require.NoError(t, r.Chip.FlipBit(0, 1000, 3))
	skipped = nil
	res = r.update(3, 0)
	require.Equal(t, int64(len(sim.Content(3, "app"))), res.Written)
	require.Equal(t, []string{"fs"}, skipped)
	r.boot()
	require.Equal(t, 3, r.Identify(r.h.Slot))
}

// A bit that flips between the write and the read-back fails the update; one
// that flips after the activation is noticed at boot.
func TestDamageIsNoticed(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	r.o.OnEvent = func(e ota.Event) {
		if e.Phase == ota.PhaseWriting && e.Part == "fs" && e.Done == e.Total {
			require.NoError(t, r.Chip.FlipBit(0, 77, 0)) // app of slot 0
		}
	}
	r.boot()
	_, err := r.dev.Update(t.Context(), &sim.Image{V: 3}, nil)
	require.ErrorIs(t, err, ota.ErrVerify)
	require.True(t, r.state().Committed)

	r.o.OnEvent = nil
	r.boot()
	trial := r.update(3, 0).Trial
	require.NoError(t, r.Chip.FlipBit(1, 55, 1)) // fs of slot 0
	r.boot()
	require.Equal(t, 2, r.Identify(r.h.Slot))
	last := r.state().Last
	require.Equal(t, ota.ReasonVerify, last.Reason)
	require.Equal(t, trial, last.Trial)
	require.Contains(t, last.Message, "digest")
	require.ErrorIs(t, r.h.Problem, ota.ErrDigest)
}

// If the committed firmware rots, what was committed before takes over, if it is
// not too old.
func TestFallbackFromDamage(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	r.boot()
	_, err := r.dev.CreateSnapshot(t.Context(), nil)
	require.NoError(t, err)
	require.NoError(t, r.Chip.FlipBit(2, 9, 7)) // app of slot 1
	r.boot()
	require.Equal(t, ota.SlotID(0), r.h.Slot)
	require.Equal(t, 2, r.Identify(0))
	require.True(t, r.state().Committed)
	require.Equal(t, ota.ReasonVerify, r.state().Last.Reason)

	// Nothing is left that may be started: neither rotten nor too old nor
	// rejected firmware.
	r = newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	require.NoError(t, r.Chip.FlipBit(2, 9, 7))
	_, _, err = r.Boot(t.Context(), &r.o)
	require.ErrorIs(t, err, ota.ErrNotBootable)
	require.ErrorIs(t, err, ota.ErrDigest)
}

func TestSnapshot(t *testing.T) {
	for _, g := range sim.Geometries() {
		t.Run(g.Name, func(t *testing.T) {
			r := newRig(t, g, ota.Options{})
			r.install(2)
			before := stateJSON(t, r.state())
			slot, err := r.dev.CreateSnapshot(t.Context(), nil)
			require.NoError(t, err)
			require.Equal(t, ota.SlotID(0), slot)
			require.Equal(t, 2, r.Identify(slot))
			require.Equal(t, before, stateJSON(t, r.state()))
			s := r.stored()
			require.Equal(t, s.Slot(1), s.Slot(0))
			require.NoError(t, r.Chip.Err())

			ops := r.Chip.Stats().BytesWritten
			slot, err = r.dev.CreateSnapshot(t.Context(), &ota.SnapshotOptions{SetAsRevert: true, CommitTimeout: 1500 * time.Millisecond})
			require.NoError(t, err)
			require.Equal(t, `{"active_slot":1,"is_committed":false,"revert_slot":0,"commit_timeout":2}`, stateJSON(t, r.state()))
			require.Less(t, r.Chip.Stats().BytesWritten-ops, 4*g.Record.Size+1, "the copy was in place")
			require.False(t, r.dev.Status().Trial, "it begins with the next boot")
			_, err = r.dev.CreateSnapshot(t.Context(), nil)
			require.ErrorIs(t, err, ota.ErrNotCommitted)
			r.boot()
			require.Equal(t, ota.SlotID(1), r.h.Slot)
			require.True(t, r.h.FirstBoot)
			r.boot()
			require.Equal(t, slot, r.h.Slot)
			require.Equal(t, 2, r.Identify(slot))
		})
	}
}

// A mutable part is copied whole, and not while it changes.
func TestSnapshotOfMutablePart(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{BufferSize: 512})
	for i := range r.Slots {
		r.Slots[i].Parts[1].Mutable = true
	}
	r.install(2)
	_, err := r.Slots[1].Parts[1].Flash.WriteAt([]byte("settings"), 2900)
	require.NoError(t, err)
	_, err = r.Slots[1].Parts[1].Flash.WriteAt([]byte("more settings"), 5)
	require.NoError(t, err)
	require.NoError(t, r.Restart())
	h, err := ota.Boot(t.Context(), r.Record, r.Slots, nil)
	require.NoError(t, err)
	require.Equal(t, ota.SlotID(1), h.Slot, "the running firmware may write to its file system")
	r.Running = 1
	r.dev, err = ota.Open(t.Context(), r.Record, r.Slots, &r.o)
	require.NoError(t, err)
	slot, err := r.dev.CreateSnapshot(t.Context(), nil)
	require.NoError(t, err)
	got := make([]byte, 8)
	_, err = r.Slots[slot].Parts[1].Flash.ReadAt(got, 2900)
	require.NoError(t, err)
	require.Equal(t, "settings", string(got))

	_, err = r.Slots[1].Parts[1].Flash.WriteAt([]byte("SETTINGS"), 2900)
	require.NoError(t, err)
	r.Chip.OnOp(func(op memflash.Op) {
		if op.Flash == 1 && op.Kind == memflash.OpSync {
			require.NoError(t, r.Chip.FlipBit(3, 2950, 0))
		}
	})
	before := stateJSON(t, r.state())
	_, err = r.dev.CreateSnapshot(t.Context(), &ota.SnapshotOptions{SetAsRevert: true})
	require.ErrorIs(t, err, ota.ErrChanged)
	require.Equal(t, before, stateJSON(t, r.state()))
}

func ptr[T any](v T) *T { return &v }

func TestSetBootState(t *testing.T) {
	type patch = ota.BootStatePatch
	// Slot 1 runs version 2, committed; slot 0 holds version 3, reverted; slot 2
	// a snapshot of version 2.
	for name, tc := range map[string]struct {
		patch patch
		want  error
		state string
	}{
		"nothing":                {patch{}, nil, ""},
		"as it is":               {patch{Active: ptr(ota.SlotID(1)), Committed: ptr(true), Revert: ptr(ota.NoSlot)}, nil, ""},
		"trial":                  {patch{Active: ptr(ota.SlotID(0)), CommitTimeout: ptr(time.Minute)}, nil, `{"active_slot":0,"is_committed":false,"revert_slot":1,"commit_timeout":60}`},
		"trial, spelled out":     {patch{ptr(ota.SlotID(0)), ptr(false), ptr(ota.SlotID(1)), nil}, nil, `{"active_slot":0,"is_committed":false,"revert_slot":1,"commit_timeout":0}`},
		"revert to rejected":     {patch{Committed: ptr(false), Revert: ptr(ota.SlotID(0))}, ota.ErrUnverifiedSlot, ""},
		"rejected revert slot":   {patch{Revert: ptr(ota.SlotID(0))}, ota.ErrUnverifiedSlot, ""},
		"trial of the running":   {patch{Committed: ptr(false), Revert: ptr(ota.SlotID(2))}, nil, `{"active_slot":1,"is_committed":false,"revert_slot":2,"commit_timeout":0}`},
		"revert slot":            {patch{Revert: ptr(ota.SlotID(2))}, nil, `{"active_slot":1,"is_committed":true,"revert_slot":2,"commit_timeout":0}`},
		"committed unseen":       {patch{Active: ptr(ota.SlotID(0)), Committed: ptr(true)}, ota.ErrInvalid, ""},
		"other revert":           {patch{Active: ptr(ota.SlotID(0)), Revert: ptr(ota.SlotID(0))}, ota.ErrInvalid, ""},
		"unknown slot":           {patch{Active: ptr(ota.SlotID(3))}, ota.ErrUnknownSlot, ""},
		"negative slot":          {patch{Active: ptr(ota.SlotID(-1))}, ota.ErrUnknownSlot, ""},
		"unknown revert":         {patch{Revert: ptr(ota.SlotID(7))}, ota.ErrUnknownSlot, ""},
		"revert to itself":       {patch{Revert: ptr(ota.SlotID(1))}, ota.ErrInvalid, ""},
		"uncommitted, no revert": {patch{Committed: ptr(false)}, ota.ErrNoRevert, ""},
		"timeout alone":          {patch{CommitTimeout: ptr(time.Minute)}, ota.ErrCommitted, ""},
		"bad timeout":            {patch{Active: ptr(ota.SlotID(0)), CommitTimeout: ptr(-time.Second)}, ota.ErrInvalid, ""},
	} {
		t.Run(name, func(t *testing.T) {
			g := fileGeometry()
			g.Slots = 3
			r := newRig(t, g, ota.Options{})
			r.install(2)
			slot, err := r.dev.CreateSnapshot(t.Context(), nil)
			require.NoError(t, err)
			require.Equal(t, ota.SlotID(2), slot)
			require.Equal(t, ota.SlotID(0), r.update(3, 0).Slot)
			r.boot()
			r.boot()
			before := r.state()
			err = r.dev.SetBootState(t.Context(), tc.patch)
			if tc.want != nil {
				require.ErrorIs(t, err, tc.want)
				require.True(t, r.stored().Equal(before))
				return
			}
			require.NoError(t, err)
			if tc.state == "" {
				tc.state = stateJSON(t, before)
			}
			require.Equal(t, tc.state, stateJSON(t, r.stored()))
		})
	}
}

func TestSetBootStateRefusals(t *testing.T) {
	other := ota.BootStatePatch{Active: ptr(ota.SlotID(0))}
	r := newRig(t, fileGeometry(), ota.Options{})
	require.ErrorIs(t, r.dev.SetBootState(t.Context(), ota.BootStatePatch{Active: ptr(ota.SlotID(1))}), ota.ErrUnverifiedSlot, "slot 1 is empty")
	r.install(2)
	require.ErrorIs(t, r.dev.SetBootState(t.Context(), other), ota.ErrRollback, "slot 0 is below the floor")
	_, err := r.dev.CreateSnapshot(t.Context(), nil)
	require.NoError(t, err)
	require.NoError(t, r.Chip.FlipBit(0, 1, 1))
	require.ErrorIs(t, r.dev.SetBootState(t.Context(), other), ota.ErrDigest)
	require.NoError(t, r.Chip.FlipBit(0, 1, 1))
	rejected := r.stored()
	rejected.Slots[0].Rejected = true
	require.NoError(t, r.Record.Store(t.Context(), rejected))
	r.boot()
	require.ErrorIs(t, r.dev.SetBootState(t.Context(), ota.BootStatePatch{Revert: ptr(ota.SlotID(0))}), ota.ErrUnverifiedSlot, "rejected")
	r.update(3, 0)
	require.ErrorIs(t, r.dev.SetBootState(t.Context(), ota.BootStatePatch{Active: ptr(ota.SlotID(1))}), ota.ErrNotCommitted)
}

// With more slots the one written is the one with the least to lose.
func TestTarget(t *testing.T) {
	g := fileGeometry()
	g.Slots = 3
	r := newRig(t, g, ota.Options{})
	require.Equal(t, ota.SlotID(1), r.update(2, 0).Slot)
	r.boot()
	require.NoError(t, r.dev.Commit(t.Context()))
	require.Equal(t, ota.SlotID(2), r.update(3, 0).Slot, "slot 2 is empty")
	r.boot()
	r.boot()
	require.Equal(t, ota.SlotID(2), r.update(4, 0).Slot, "what slot 2 holds was rejected")
	r.boot()
	require.NoError(t, r.dev.Commit(t.Context()))
	require.Equal(t, ota.SlotID(0), r.update(5, 0).Slot, "the lowest")
	require.NoError(t, r.dev.Revert(t.Context()))
	require.Equal(t, ota.SlotID(0), r.update(5, 0).Slot, "in place already")
	require.NoError(t, r.dev.Revert(t.Context()))

	r = newRig(t, g, ota.Options{})
	for i := range r.Slots {
		r.Slots[i].ReadOnly = i != 2
	}
	r.boot()
	require.Equal(t, ota.SlotID(2), r.update(2, 0).Slot)
	r.boot()
	require.NoError(t, r.dev.Commit(t.Context()))
	_, err := r.dev.Update(t.Context(), &sim.Image{V: 3}, nil)
	require.ErrorIs(t, err, ota.ErrNoTarget)
}

func TestIgnoreSameVersion(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	same := &ota.UpdateOptions{IgnoreSameVersion: true}
	res, err := r.dev.Update(t.Context(), &sim.Image{V: 2}, same)
	require.NoError(t, err)
	require.Equal(t, ota.UpdateResult{Slot: ota.NoSlot, Same: true}, res)
	require.True(t, r.state().Committed)
	res, err = r.dev.Update(t.Context(), &sim.Image{V: 2, Mutate: func(i *ota.ImageInfo) { i.BuildID = "x" }}, same)
	require.NoError(t, err)
	require.True(t, res.Same, "the digests are the same")
	res, err = r.dev.Update(t.Context(), &sim.Image{V: 3}, same)
	require.NoError(t, err)
	require.False(t, res.Same)
	require.NoError(t, r.dev.Revert(t.Context()))
	require.False(t, r.update(2, 0).Same, "unless asked for, the same is installed again")
}

// Unsigned images may lack a digest, and are measured.
func TestImageWithoutDigest(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	bare := func(i *ota.ImageInfo) { i.Parts[0].SHA256 = nil }
	_, err := r.dev.Update(t.Context(), &sim.Image{V: 2, Mutate: bare}, nil)
	require.ErrorIs(t, err, ota.ErrUnverified, "a signature says nothing about such a part")
	_, err = r.dev.Update(t.Context(), &sim.Image{V: 2, Mutate: func(i *ota.ImageInfo) {
		bare(i)
		i.SignedBy, i.Unsigned = nil, true
	}}, nil)
	require.NoError(t, err)
	require.Equal(t, sha256.Sum256(sim.Content(2, "app")), r.state().Slot(1).Parts[0].SHA256)
	r.boot()
	require.True(t, r.h.Verified)
}

type zeroErase struct{ ota.Flash }

func (zeroErase) EraseSize() int64       { return 0 }
func (zeroErase) Erase(_, _ int64) error { return nil }

func TestOpenRefusals(t *testing.T) {
	slot := func(names ...string) (s ota.Slot) {
		for _, n := range names {
			s.Parts = append(s.Parts, ota.Part{Name: n, Flash: memflash.New(memflash.Config{Size: 10})})
		}
		return s
	}
	shared := slot("app")
	for name, slots := range map[string][]ota.Slot{
		"none":          nil,
		"one":           {slot("app")},
		"too many":      make([]ota.Slot, ota.MaxSlots+1),
		"shared flash":  {shared, shared},
		"no erase size": {slot("app"), {Parts: []ota.Part{{Name: "app", Flash: zeroErase{shared.Parts[0].Flash}}}}},
		"no parts":      {slot("app"), slot()},
		"no flash":      {slot("app"), {Parts: []ota.Part{{Name: "app"}}}},
		"no name":       {slot("app"), slot("")},
		"long name":     {slot("app"), slot(strings.Repeat("x", ota.MaxPartName+1))},
		"two of a name": {slot("app", "app"), slot("app", "app")},
		"other parts":   {slot("app"), slot("fs")},
		"more parts":    {slot("app"), slot("app", "fs")},
		"none writable": {{Parts: slot("app").Parts, ReadOnly: true}, {Parts: slot("app").Parts, ReadOnly: true}},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := sim.New(fileGeometry())
			require.NoError(t, err)
			d.Running = 0
			_, err = ota.Open(t.Context(), d.Record, slots, nil)
			require.ErrorIs(t, err, ota.ErrInvalid)
			_, err = ota.Boot(t.Context(), d.Record, slots, nil)
			require.ErrorIs(t, err, ota.ErrInvalid)
		})
	}
	d, err := sim.New(fileGeometry())
	require.NoError(t, err)
	d.Running = 2
	_, err = ota.Open(t.Context(), d.Record, d.Slots, nil)
	require.ErrorIs(t, err, ota.ErrUnknownSlot)
	d.Running = 0
	_, err = ota.Open(t.Context(), d.Record, d.Slots, &ota.Options{Tries: -1})
	require.ErrorIs(t, err, ota.ErrInvalid)
	require.NoError(t, d.Record.Store(t.Context(), ota.BootState{Active: 5, Revert: ota.NoSlot, Committed: true}))
	_, err = ota.Open(t.Context(), d.Record, d.Slots, nil)
	require.ErrorIs(t, err, ota.ErrUnknownSlot)
}

// If every copy of the boot record is lost, no slot is taken for committed.
func TestLostBootState(t *testing.T) {
	lose := func(r *rig) {
		for i := range 3 {
			require.NoError(t, r.Chip.FlipBit(2*len(r.Slots)+i, 40, 2))
		}
	}
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	lose(r)
	for i := range 4 {
		r.boot()
		require.Equal(t, ota.SlotID(i%2), r.h.Slot, "the slots take turns")
		require.False(t, r.h.Verified)
		s := r.state()
		require.False(t, s.Committed)
		require.Equal(t, ota.ReasonLost, s.Last.Reason)
		_, err := r.dev.Update(t.Context(), &sim.Image{V: 3}, nil)
		require.ErrorIs(t, err, ota.ErrNotCommitted)
	}
	require.NoError(t, r.dev.Watch(t.Context()), "it commits itself")
	r.boot()
	require.Equal(t, ota.SlotID(1), r.h.Slot)
	require.True(t, r.state().Committed)

	// Without a boot stage of ours the running firmware is on trial.
	lose(r)
	require.NoError(t, r.Restart())
	r.Running = 1
	dev, err := ota.Open(t.Context(), r.Record, r.Slots, &r.o)
	require.NoError(t, err)
	s, err := dev.BootState(t.Context())
	require.NoError(t, err)
	require.False(t, s.Committed)
	require.ErrorIs(t, dev.Revert(t.Context()), ota.ErrNoRevert)
	require.NoError(t, dev.Commit(t.Context()))
}

func TestBusy(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.install(2)
	reading, proceed := make(chan struct{}), make(chan struct{})
	img := &sim.Image{V: 3, Wrap: func(p string, rd io.Reader) io.Reader {
		if p == "fs" {
			close(reading)
			<-proceed
		}
		return rd
	}}
	done := make(chan error)
	go func() {
		_, err := r.dev.Update(context.Background(), img, nil)
		done <- err
	}()
	<-reading
	_, err := r.dev.Update(t.Context(), &sim.Image{V: 4}, nil)
	require.ErrorIs(t, err, ota.ErrBusy)
	_, err = r.dev.CreateSnapshot(t.Context(), nil)
	require.ErrorIs(t, err, ota.ErrBusy)
	require.ErrorIs(t, r.dev.Commit(t.Context()), ota.ErrBusy)
	require.ErrorIs(t, r.dev.Revert(t.Context()), ota.ErrBusy)
	require.ErrorIs(t, r.dev.SetBootState(t.Context(), ota.BootStatePatch{Active: ptr(ota.SlotID(0))}), ota.ErrBusy)
	require.True(t, r.state().Committed)
	st := r.dev.Status()
	require.Equal(t, "update", st.Busy)
	require.InDelta(t, 0.68, st.Progress, 0.05)
	close(proceed)
	require.NoError(t, <-done)
	require.Empty(t, r.dev.Status().Busy)
	require.Equal(t, 1.0, r.dev.Status().Progress)
}

// The callback sees every phase, the end of each part and the end of it all.
func TestEvents(t *testing.T) {
	var got []string
	o := ota.Options{BufferSize: 512, OnEvent: func(e ota.Event) {
		if e.Done < e.Total {
			return
		}
		s := e.Phase.String()
		if e.Part != "" {
			s += " " + e.Part
		}
		got = append(got, s)
	}}
	r := newRig(t, sim.Geometries()[0], o)
	r.install(2)
	got = nil
	r.update(3, 0)
	require.Equal(t, []string{"checking", "storing", "erasing app", "writing app", "writing fs",
		"verifying app", "verifying fs", "storing", "done"}, got)
	got = nil
	_, err := r.dev.Update(t.Context(), &sim.Image{V: 4}, nil)
	require.ErrorIs(t, err, ota.ErrNotCommitted)
	require.Equal(t, []string{"checking", "failed"}, got)
}

func TestBootStateJSON(t *testing.T) {
	var s ota.BootState
	require.NoError(t, json.Unmarshal([]byte(`{"active_slot": 1, "is_committed": false, "revert_slot": 0, "commit_timeout": 300}`), &s))
	require.Equal(t, ota.BootState{Active: 1, Revert: 0, CommitTimeout: 5 * time.Minute}, s)
	for _, bad := range []string{`{"commit_timeout": -1}`, `{"commit_timeout": 9999999999}`, `{"active_slot": "x"}`, `[]`} {
		require.Error(t, json.Unmarshal([]byte(bad), &s), bad)
	}
	id, err := ota.ParseTrialID("0123456789abcdef")
	require.NoError(t, err)
	require.Equal(t, "0123456789abcdef", id.String())
	for _, bad := range []string{"", "0123", "0123456789abcdeg", "0123456789abcdef00"} {
		_, err := ota.ParseTrialID(bad)
		require.ErrorIs(t, err, ota.ErrInvalid, bad)
	}
}

// A snapshot that would lack a part of the running firmware is none.
func TestSnapshotOfMoreParts(t *testing.T) {
	g := fileGeometry()
	g.Slots = 3
	r := newRig(t, g, ota.Options{})
	r.Slots[0].ReadOnly = true
	r.Slots[1].Parts = r.Slots[1].Parts[:1]
	r.Slots[2].Parts = r.Slots[2].Parts[:1]
	dev, err := ota.Open(t.Context(), r.Record, r.Slots, &r.o)
	require.NoError(t, err)
	_, err = dev.CreateSnapshot(t.Context(), nil)
	require.ErrorIs(t, err, ota.ErrIncomplete)
}

// While a reboot is pending nothing else starts.
func TestRebootPending(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.update(2, 0)
	r.boot()
	require.NoError(t, r.dev.Revert(t.Context()))
	_, err := r.dev.CreateSnapshot(t.Context(), nil)
	require.ErrorIs(t, err, ota.ErrRebootPending)
	require.ErrorIs(t, r.dev.SetBootState(t.Context(), ota.BootStatePatch{Active: ptr(ota.SlotID(1))}), ota.ErrRebootPending)
}

// Before anything is erased the stored state ceases to point there, also where
// only the absence of a state pointed there.
func TestForgetsBeforeErasing(t *testing.T) {
	d, err := sim.New(fileGeometry())
	require.NoError(t, err)
	// The factory used slot 1; slot 0 is empty, and the boot stage can tell.
	for i, p := range []string{"app", "fs"} {
		require.NoError(t, d.Chip.Poke(2+i, sim.Content(1, p), 0))
		require.NoError(t, d.Chip.Poke(i, make([]byte, d.Slots[0].Parts[i].Flash.Size()), 0))
	}
	begun := func(_ context.Context, id ota.SlotID) error {
		b := make([]byte, 4)
		if err := d.Chip.Peek(2*int(id), b, 0); err != nil {
			return err
		}
		if bytes.Equal(b, make([]byte, 4)) {
			return errRefused
		}
		return nil
	}
	h, err := ota.Boot(t.Context(), d.Record, d.Slots, &ota.BootOptions{Check: begun})
	require.NoError(t, err)
	require.Equal(t, ota.SlotID(1), h.Slot)
	d.Running = h.Slot
	dev, err := ota.Open(t.Context(), d.Record, d.Slots, &ota.Options{Platform: "sim", Product: "demo", BufferSize: 512})
	require.NoError(t, err)
	d.Chip.OnOp(func(op memflash.Op) {
		if op.Flash == 0 && op.Kind == memflash.OpWrite && op.Off > 512 {
			d.Chip.PowerOff(memflash.LoseNone, 0)
		}
	})
	_, err = dev.Update(t.Context(), &sim.Image{V: 2}, nil)
	require.ErrorIs(t, err, memflash.ErrPowerOff)
	d.Chip.OnOp(nil)
	require.NoError(t, d.Restart())
	h, err = ota.Boot(t.Context(), d.Record, d.Slots, &ota.BootOptions{Check: begun})
	require.NoError(t, err)
	require.Equal(t, ota.SlotID(1), h.Slot)

	// A revert slot that is information only is forgotten as well.
	g := fileGeometry()
	g.Slots = 3
	r := newRig(t, g, ota.Options{})
	r.install(2)
	_, err = r.dev.CreateSnapshot(t.Context(), nil)
	require.NoError(t, err)
	require.NoError(t, r.dev.SetBootState(t.Context(), ota.BootStatePatch{Revert: ptr(ota.SlotID(2))}))
	r.Slots[0].ReadOnly = true
	r.boot()
	_, err = r.dev.Update(t.Context(), &sim.Image{V: 3, Wrap: func(string, io.Reader) io.Reader { return errReader{io.ErrNoProgress} }}, nil)
	require.ErrorIs(t, err, io.ErrNoProgress)
	require.Equal(t, ota.NoSlot, r.stored().Revert)
}

// Bytes behind the image are found by the read-back.
func TestBytesBehindTheImage(t *testing.T) {
	r := newRig(t, sim.Geometries()[0], ota.Options{})
	r.o.OnEvent = func(e ota.Event) {
		if e.Phase == ota.PhaseWriting && e.Part == "fs" && e.Done == e.Total {
			require.NoError(t, r.Chip.FlipBit(2, 8000, 0))
		}
	}
	r.boot()
	_, err := r.dev.Update(t.Context(), &sim.Image{V: 2}, nil)
	require.ErrorIs(t, err, ota.ErrVerify)
}

// A trial needs something to go back to that can be verified.
func TestTrialMeasuresTheRunning(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{})
	r.update(2, 0)
	s := r.state()
	require.NoError(t, r.dev.Revert(t.Context()))
	s = s.Clone()
	s.Active, s.Revert, s.Committed, s.Slots[0] = 0, ota.NoSlot, true, ota.SlotState{}
	require.NoError(t, r.Record.Store(t.Context(), s))
	r.boot()
	require.NoError(t, r.dev.SetBootState(t.Context(), ota.BootStatePatch{Active: ptr(ota.SlotID(1))}))
	require.Len(t, r.stored().Slot(0).Parts, 2)
	require.True(t, r.stored().Slot(0).Approved)
}

// Progress is reported ten times per second at most, and at its end.
func TestEventRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		writing := 0
		o := ota.Options{BufferSize: 64, OnEvent: func(e ota.Event) {
			if e.Phase == ota.PhaseWriting && e.Part == "app" {
				writing++
			}
		}}
		r := newRig(t, fileGeometry(), o)
		slow := func(p string, rd io.Reader) io.Reader { return &slowReader{rd, 25 * time.Millisecond} }
		_, err := r.dev.Update(t.Context(), &sim.Image{V: 2, Wrap: slow}, nil)
		require.NoError(t, err)
		n := (len(sim.Content(2, "app")) + 63) / 64
		require.InDelta(t, n/4+1, writing, 2)
	})
}

type slowReader struct {
	io.Reader
	d time.Duration
}

func (s *slowReader) Read(p []byte) (int, error) {
	<-time.After(s.d)
	return s.Reader.Read(p)
}

// A write or erase that fails is reported as what it is and where it was.
func TestWriteErrors(t *testing.T) {
	for kind, word := range map[memflash.OpKind]string{memflash.OpWrite: "write", memflash.OpErase: "erase", memflash.OpSync: ""} {
		r := newRig(t, sim.Geometries()[0], ota.Options{BufferSize: 512})
		r.install(2)
		f := memflash.Fault{Kind: memflash.Fail, On: kind, Flash: 0, Len: 8 << 10}
		if kind == memflash.OpSync {
			f.Len = 0
			r.Chip.OnOp(func(op memflash.Op) {
				if op.Flash == 0 && op.Kind == memflash.OpErase {
					r.Chip.OnOp(nil)
					r.Chip.Plan(f) // the next sync is that of the part
				}
			})
		} else {
			r.Chip.Plan(f)
		}
		_, err := r.dev.Update(t.Context(), &sim.Image{V: 3}, nil)
		require.ErrorIs(t, err, memflash.ErrFault)
		require.Contains(t, err.Error(), word)
		require.Zero(t, r.Chip.Pending())
	}
}
