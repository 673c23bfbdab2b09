package ubiflash

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/flashtest"
)

// vol is a simulated volume, with the rules of the kernel's.
type vol struct {
	i      Info
	b      []byte
	marker bool // an update is under way, or was interrupted
	want   int64
	got    []byte
	leb    int64 // being changed, or -1
	failAt int   // write that fails
	writes int
	open   int
}

const leb = 1000

func newVol(lebs int64) *vol {
	return &vol{i: Info{Name: "v", Size: lebs * leb, LEBSize: leb}, b: bytes.Repeat([]byte{0xff}, int(lebs*leb)), leb: -1, failAt: -1, open: 1}
}

func (v *vol) info() (Info, error) {
	i := v.i
	i.Interrupted = v.marker
	return i, nil
}

func (v *vol) ReadAt(p []byte, off int64) (int, error) {
	if v.marker {
		return 0, errBadVolume
	}
	n := copy(p, v.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (v *vol) update(n int64) error {
	v.marker, v.want, v.got, v.leb = true, n, nil, -1
	for i := range v.b {
		v.b[i] = 0xff
	}
	return nil
}

func (v *vol) change(lnum, n int32) error {
	v.leb, v.want, v.got = int64(lnum)*v.i.LEBSize, int64(n), nil
	return nil
}

func (v *vol) Write(p []byte) (int, error) {
	if v.writes++; v.writes == v.failAt {
		return len(p) / 2, errors.New("no space")
	}
	if v.want == 0 {
		return 0, errors.New("operation not permitted")
	}
	v.got = append(v.got, p...)
	if int64(len(v.got)) >= v.want {
		at := max(v.leb, 0)
		copy(v.b[at:], v.got[:v.want])
		v.marker, v.want, v.leb = false, 0, -1
	}
	return len(p), nil
}

func (v *vol) reopen() error {
	v.want, v.leb = 0, -1
	return nil
}

func (v *vol) close() error { v.open--; return nil }

func fill(n int, seed byte) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func open(t *testing.T, v *vol, o Options) *Flash {
	f, err := newFlash(v, "sim", &o)
	require.NoError(t, err)
	return f
}

func TestOrder(t *testing.T) {
	v := newVol(10)
	f := open(t, v, Options{})
	require.EqualValues(t, 10*leb, f.Size())
	data := fill(5*leb+7, 1)
	_, err := f.WriteAt(data[:10], 10)
	require.ErrorIs(t, err, ErrOrder)
	require.False(t, v.marker, "nothing was begun")
	_, err = f.WriteAt(data[:3000], 0)
	require.NoError(t, err)
	for _, off := range []int64{2999, 3001, 5000} {
		_, err = f.WriteAt(data[:10], off)
		require.ErrorIs(t, err, ErrOrder)
	}
	_, err = f.ReadAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, ErrUpdating)
	_, err = f.WriteAt(data[3000:], 3000)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.NoError(t, f.Sync())
	got := make([]byte, 10*leb)
	n, err := f.ReadAt(got, 0)
	require.NoError(t, err)
	require.Equal(t, len(got), n)
	require.Equal(t, data, got[:len(data)])
	require.Equal(t, bytes.Repeat([]byte{0xff}, 10*leb-len(data)), got[len(data):])

	// All of it, without Sync; and the next one.
	for seed := range byte(3) {
		data = fill(10*leb, seed)
		_, err = f.WriteAt(data, 0)
		require.NoError(t, err)
		require.Equal(t, data, v.b)
		_, err = f.ReadAt(got, 0)
		require.NoError(t, err)
		require.Equal(t, data, got)
	}
	// A write at 0 begins anew at any time.
	_, err = f.WriteAt(data[:5], 0)
	require.NoError(t, err)
	_, err = f.WriteAt(data[5:10], 0)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.Equal(t, data[5:10], v.b[:5])
	require.NoError(t, f.Close())
	require.Zero(t, v.open)
}

func TestInterrupted(t *testing.T) {
	v := newVol(4)
	v.marker = true // before this start
	f := open(t, v, Options{Size: 3 * leb})
	p := make([]byte, 10)
	_, err := f.ReadAt(p, 0)
	require.ErrorIs(t, err, ErrInterrupted)
	require.ErrorIs(t, err, errBadVolume)
	i, err := f.Info()
	require.NoError(t, err)
	require.True(t, i.Interrupted)
	data := fill(3*leb, 1)
	_, err = f.WriteAt(data, 0)
	require.NoError(t, err)
	_, err = f.ReadAt(p, 3*leb-10)
	require.NoError(t, err)
	require.Equal(t, data[3*leb-10:], p)
	n, err := f.ReadAt(p, 3*leb-4)
	require.ErrorIs(t, err, io.EOF)
	require.Equal(t, 4, n)
}

func TestWriteFails(t *testing.T) {
	v := newVol(4)
	v.failAt = 2
	f := open(t, v, Options{})
	data := fill(4*leb, 1)
	_, err := f.WriteAt(data[:leb], 0)
	require.NoError(t, err)
	_, err = f.WriteAt(data[leb:], leb)
	require.ErrorContains(t, err, "no space")
	_, err = f.WriteAt(data[leb:], leb)
	require.ErrorContains(t, err, "an earlier write failed")
	require.Error(t, f.Sync())
	_, err = f.ReadAt(data[:1], 0)
	require.ErrorIs(t, err, ErrUpdating)
	data = fill(4*leb, 2)
	_, err = f.WriteAt(data, 0)
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	require.Equal(t, data, v.b)
}

func TestBounds(t *testing.T) {
	v := newVol(2)
	for _, size := range []int64{-1, 2*leb + 1} {
		_, err := newFlash(v, "sim", &Options{Size: size})
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
	f := open(t, v, Options{})
	_, err := f.WriteAt(make([]byte, 2*leb+1), 0)
	require.ErrorIs(t, err, ota.ErrTooLarge)
	_, err = f.WriteAt(make([]byte, 1), -1)
	require.ErrorIs(t, err, ota.ErrInvalid)
	_, err = f.ReadAt(make([]byte, 1), -1)
	require.ErrorIs(t, err, ota.ErrInvalid)
	_, err = open(t, v, Options{ReadOnly: true}).WriteAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, ota.ErrReadOnly)
	require.Zero(t, v.writes)
	_, err = Open(filepath.Join(t.TempDir(), "none"), nil)
	require.Error(t, err)
	_, err = OpenLEB(filepath.Join(t.TempDir(), "none"), 0, 0)
	require.Error(t, err)
}

func TestLEB(t *testing.T) {
	v := newVol(4)
	l, err := newLEB(v, "sim", 2, 0)
	require.NoError(t, err)
	require.NoError(t, flashtest.Test(l))
	require.Equal(t, bytes.Repeat([]byte{0xff}, 2*leb), v.b[:2*leb])
	require.Equal(t, bytes.Repeat([]byte{0xff}, leb), v.b[3*leb:])

	// A write that fails leaves what was there.
	before := bytes.Clone(v.b)
	v.failAt = v.writes + 1
	_, err = l.WriteAt([]byte("new"), 5)
	require.ErrorContains(t, err, "no space")
	require.Equal(t, before, v.b)
	_, err = l.WriteAt([]byte("new"), 5)
	require.NoError(t, err)
	require.Equal(t, "new", string(v.b[2*leb+5:2*leb+8]))
	require.NoError(t, l.Close())

	for _, tc := range []struct {
		num    int
		size   int64
		change func(*vol)
		err    error
	}{
		{4, 0, func(*vol) {}, ota.ErrInvalid}, {-1, 0, func(*vol) {}, ota.ErrInvalid}, {0, leb + 1, func(*vol) {}, ota.ErrInvalid},
		{0, 0, func(v *vol) { v.i.Static = true }, ota.ErrInvalid}, {0, 0, func(v *vol) { v.marker = true }, ErrInterrupted},
	} {
		v := newVol(4)
		tc.change(v)
		_, err := newLEB(v, "sim", tc.num, tc.size)
		require.ErrorIs(t, err, tc.err)
	}
}

// image is one part.
type image struct {
	data []byte
	done bool
}

func (m *image) Info() ota.ImageInfo {
	return ota.ImageInfo{Platform: "p", Version: "2", Unsigned: true, Parts: []ota.PartInfo{{Name: "rootfs", Size: int64(len(m.data))}}}
}

func (m *image) Next(context.Context) (*ota.ImagePart, error) {
	if m.done {
		return nil, io.EOF
	}
	m.done = true
	return &ota.ImagePart{PartInfo: m.Info().Parts[0], Data: bytes.NewReader(m.data)}, nil
}

// A device whose slots are volumes, and whose record is in blocks of a third one.
func TestUpdate(t *testing.T) {
	ctx := t.Context()
	a, b, state := newVol(300), newVol(300), newVol(3*bootrecord.MaxSize/leb+3)
	b.marker = true // interrupted before
	state.i.Size, state.i.LEBSize = 3*bootrecord.MaxSize, bootrecord.MaxSize
	var copies []ota.Flash
	for i := range 3 {
		l, err := newLEB(state, "sim", i, 0)
		require.NoError(t, err)
		copies = append(copies, l)
	}
	record, err := bootrecord.New(copies, &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return 0, nil }})
	require.NoError(t, err)
	dev, err := ota.Open(ctx, record, []ota.Slot{
		{Parts: []ota.Part{{Name: "rootfs", Flash: open(t, a, Options{})}}},
		{Parts: []ota.Part{{Name: "rootfs", Flash: open(t, b, Options{})}}},
	}, &ota.Options{Platform: "p", BufferSize: 4096})
	require.NoError(t, err)
	data := fill(123_457, 1)
	res, err := dev.Update(ctx, &image{data: data}, nil)
	require.NoError(t, err)
	require.EqualValues(t, 1, res.Slot)
	require.Equal(t, data, b.b[:len(data)])
	st, err := record.Load(ctx)
	require.NoError(t, err)
	require.EqualValues(t, 1, st.Active)
}
