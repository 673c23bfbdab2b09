package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/flash/fileflash"
	"github.com/stretchr/testify/require"
)

// board is a device whose slots are files.
type board struct {
	slot  [2]string
	state string
}

func newBoard(t *testing.T) board {
	t.Helper()
	dir := t.TempDir()
	b := board{slot: [2]string{filepath.Join(dir, "a.img"), filepath.Join(dir, "b.img")}, state: dir}
	for _, path := range b.slot {
		require.NoError(t, os.WriteFile(path, bytes.Repeat([]byte("factory!"), 1024), 0o600))
	}
	return b
}

func (b board) choose(t *testing.T) ota.Handover {
	t.Helper()
	h, err := choose(t.Context(), b.slot[0], b.slot[1], b.state)
	require.NoError(t, err)
	require.NoError(t, h.Problem)
	return h
}

// update installs a firmware as the daemon would while slot 0 runs.
func (b board) update(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	var slots []ota.Slot
	for _, path := range b.slot {
		f, err := fileflash.Open(path, nil)
		require.NoError(t, err)
		defer f.Close()
		slots = append(slots, ota.Slot{Parts: []ota.Part{{Name: "rootfs", Flash: f}}})
	}
	var copies []string
	for _, name := range []string{"boot.0", "boot.1", "boot.2"} {
		copies = append(copies, filepath.Join(b.state, name))
	}
	record, err := bootrecord.Files(copies, &bootrecord.Options{
		Running: func(context.Context) (ota.SlotID, error) { return 0, nil },
	})
	require.NoError(t, err)
	dev, err := ota.Open(ctx, record, slots, nil)
	require.NoError(t, err)

	var zip bytes.Buffer
	m := &bundle.Manifest{Version: "2.0", Parts: []bundle.Part{{Name: "rootfs", Src: "rootfs.img"}}}
	files := map[string]bundle.File{"rootfs.img": bytes.NewReader(bytes.Repeat([]byte("version2"), 1000))}
	require.NoError(t, bundle.Write(ctx, &zip, m, files, nil))
	policy := &bundle.Policy{AllowUnsigned: true}
	img, err := policy.Open(ctx, &zip)
	require.NoError(t, err)
	res, err := dev.Update(ctx, img, nil)
	require.NoError(t, err)
	require.Equal(t, ota.SlotID(1), res.Slot)
}

func TestTrialGetsOneBoot(t *testing.T) {
	b := newBoard(t)
	h := b.choose(t)
	require.Equal(t, ota.SlotID(0), h.Slot, "what the device came with")
	require.False(t, h.FirstBoot)

	b.update(t)
	h = b.choose(t)
	require.Equal(t, ota.SlotID(1), h.Slot, "the trial")
	require.True(t, h.FirstBoot)
	require.True(t, h.Verified)

	for range 2 {
		h = b.choose(t)
		require.Equal(t, ota.SlotID(0), h.Slot, "not committed")
		require.True(t, h.State.Committed)
		require.Equal(t, ota.ReasonReset, h.State.Last.Reason)
	}
}

func TestDamagedTrialIsNotStarted(t *testing.T) {
	b := newBoard(t)
	b.update(t)
	f, err := os.OpenFile(b.slot[1], os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte("?"), 4000)
	require.NoError(t, err)
	require.NoError(t, f.Close())

	h, err := choose(t.Context(), b.slot[0], b.slot[1], b.state)
	require.NoError(t, err)
	require.Equal(t, ota.SlotID(0), h.Slot)
	require.ErrorIs(t, h.Problem, ota.ErrDigest)
	require.Equal(t, ota.ReasonVerify, h.State.Last.Reason)
}

// A slot that cannot even be opened does not keep the other one from starting.
func TestSlotIsGone(t *testing.T) {
	ctx := t.Context()
	gone := func(b board, i int) {
		require.NoError(t, os.Remove(b.slot[i]))
	}
	start := func(b board, want ota.SlotID) ota.Handover {
		t.Helper()
		h, err := choose(ctx, b.slot[0], b.slot[1], b.state)
		require.NoError(t, err)
		require.Equal(t, want, h.Slot)
		require.ErrorIs(t, h.Problem, os.ErrNotExist)
		return h
	}

	b := newBoard(t) // no boot state yet
	gone(b, 1)
	start(b, 0)
	b = newBoard(t)
	gone(b, 0)
	start(b, 1)

	b = newBoard(t) // on trial
	b.update(t)
	gone(b, 1)
	h := start(b, 0)
	require.Equal(t, ota.ReasonVerify, h.State.Last.Reason)
	require.Contains(t, h.State.Last.Message, "open", "why it could not be verified")
	require.True(t, h.State.Committed)
	start(b, 0)

	b = newBoard(t) // the way back
	b.update(t)
	gone(b, 0)
	h = start(b, 1)
	require.True(t, h.FirstBoot)
	require.True(t, h.Verified)

	gone(b, 1)
	_, err := choose(ctx, b.slot[0], b.slot[1], b.state)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorIs(t, err, ota.ErrNotBootable)
}

func TestNothingToStart(t *testing.T) {
	b := newBoard(t)
	_, err := choose(t.Context(), b.slot[0], b.slot[1], filepath.Join(b.state, "none"))
	require.ErrorIs(t, err, os.ErrNotExist, "a state directory that is not mounted is no fresh device")

	// Both slots damaged after they were known to be good.
	b.update(t)
	for _, path := range b.slot {
		require.NoError(t, os.WriteFile(path, make([]byte, 8192), 0o600))
	}
	_, err = choose(t.Context(), b.slot[0], b.slot[1], b.state)
	require.ErrorIs(t, err, ota.ErrNotBootable)
}
