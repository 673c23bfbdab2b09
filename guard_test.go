package ota_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"io"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
	"github.com/stretchr/testify/require"
)

// twins are images of equal sizes: info describes the parts of some of them, data
// holds the bytes of some.
type twins struct {
	info, data map[string]byte // by part
	next       int
}

var twinParts = []string{"app", "fs"}

func twinContent(part string, v byte) []byte {
	return bytes.Repeat([]byte{v, part[0]}, 700)
}

func (w *twins) Info() ota.ImageInfo {
	info := ota.ImageInfo{Name: "demo", Platform: "sim", Version: "1", SignedBy: []string{"test"}}
	for _, p := range twinParts {
		sum := sha256.Sum256(twinContent(p, w.info[p]))
		info.Parts = append(info.Parts, ota.PartInfo{Name: p, Size: 1400, SHA256: &sum})
	}
	return info
}

func (w *twins) Next(context.Context) (*ota.ImagePart, error) {
	info := w.Info()
	if w.next == len(info.Parts) {
		return nil, io.EOF
	}
	p := info.Parts[w.next]
	w.next++
	return &ota.ImagePart{PartInfo: p, Data: bytes.NewReader(twinContent(p.Name, w.data[p.Name]))}, nil
}

// A slot never ends up with parts of two images, whatever it held before, and
// whatever comes under the description of another.
func TestMixAndMatch(t *testing.T) {
	x, y := map[string]byte{"app": 'x', "fs": 'x'}, map[string]byte{"app": 'y', "fs": 'y'}
	xy, yx := map[string]byte{"app": 'x', "fs": 'y'}, map[string]byte{"app": 'y', "fs": 'x'}
	for _, before := range []map[string]byte{nil, x, y} {
		for _, info := range []map[string]byte{x, y} {
			for _, data := range []map[string]byte{x, y, xy, yx} {
				r := newRig(t, sim.Geometries()[0], ota.Options{})
				if before != nil {
					_, err := r.dev.Update(t.Context(), &twins{info: before, data: before}, nil)
					require.NoError(t, err)
					require.NoError(t, r.dev.Revert(t.Context()))
				}
				_, err := r.dev.Update(t.Context(), &twins{info: info, data: data}, nil)
				if err != nil {
					require.ErrorIs(t, err, ota.ErrDigest)
					require.NotEqual(t, info, data)
					require.True(t, r.stored().Committed)
					continue
				}
				for i, p := range twinParts {
					got := make([]byte, 1400)
					require.NoError(t, r.Chip.Peek(2+i, got, 0))
					require.Equal(t, twinContent(p, info[p]), got, "part %s of %q after %q from %q", p, info, before, data)
				}
			}
		}
	}
}

// The security version rises by the step at most, also where a sum overflows.
func TestSecurityStep(t *testing.T) {
	r := newRig(t, fileGeometry(), ota.Options{SecurityStep: 4})
	update := func(security uint64) error {
		_, err := r.dev.Update(t.Context(), &sim.Image{V: 3, Mutate: func(i *ota.ImageInfo) { i.Security = security }}, nil)
		return err
	}
	for _, tooFar := range []uint64{5, math.MaxUint64} {
		require.ErrorIs(t, update(tooFar), ota.ErrStep)
	}
	require.NoError(t, update(4))
	r.boot()
	require.NoError(t, r.dev.Commit(t.Context()))
	require.ErrorIs(t, update(9), ota.ErrStep)
	require.ErrorIs(t, update(3), ota.ErrRollback)

	r.o.SecurityStep = math.MaxUint64 - 1
	r.boot()
	require.NoError(t, update(math.MaxUint64))
}

// An update that is given up while a write takes its time is over when the write
// is, not before.
func TestGivenUpWhileWriting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, fileGeometry(), ota.Options{BufferSize: 512})
		r.install(2)
		r.Chip.Plan(memflash.Fault{Kind: memflash.Slow, On: memflash.OpWrite, Flash: 0, Off: 512, Len: 1, Delay: 10 * time.Minute})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		// The second buffer is read, and then nothing comes any more.
		stuck := func(_ string, rd io.Reader) io.Reader {
			return io.MultiReader(io.LimitReader(rd, 1024), untilDone{ctx})
		}
		begun := time.Now()
		_, err := r.dev.Update(ctx, &sim.Image{V: 3, Wrap: stuck}, nil)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.GreaterOrEqual(t, time.Since(begun), 10*time.Minute)
		require.Zero(t, r.Chip.Pending())
		ops := r.Chip.Ops()
		<-time.After(time.Hour)
		require.Equal(t, ops, r.Chip.Ops(), "nothing is written once the update is over")
		r.update(3, 0)
	})
}

// untilDone is a source of which nothing comes until ctx ends.
type untilDone struct{ ctx context.Context }

func (u untilDone) Read([]byte) (int, error) {
	<-u.ctx.Done()
	return 0, u.ctx.Err()
}

// The erasure of a large part is reported on, and can be given up.
func TestEraseGivenUp(t *testing.T) {
	for _, unit := range []int64{4 << 10, 192 << 10} {
		size := 40 * (192 << 10)
		g := sim.Geometries()[0]
		g.App = memflash.Config{Size: int64(size), EraseSize: unit}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		r := newRig(t, g, ota.Options{OnEvent: func(e ota.Event) {
			if e.Phase == ota.PhaseWriting && e.Part == "app" {
				cancel()
			}
		}})
		erased := int64(0)
		r.Chip.OnOp(func(op memflash.Op) {
			if op.Kind == memflash.OpErase && op.Flash == 2 {
				erased += op.Len
			}
		})
		large := make([]byte, size)
		_, err := r.dev.Update(ctx, &sim.Image{
			V:      2,
			Mutate: func(i *ota.ImageInfo) { i.Parts[0].Size, i.Parts[0].SHA256 = int64(size), ptr(sha256.Sum256(large)) },
			Wrap:   func(string, io.Reader) io.Reader { return bytes.NewReader(large) },
		}, nil)
		require.ErrorIs(t, err, context.Canceled)
		require.Positive(t, erased)
		require.Less(t, erased, int64(size/2))
	}
}

func TestRegionRefuses(t *testing.T) {
	f := memflash.New(memflash.Config{Size: 64 << 10, EraseSize: 4 << 10})
	plain := memflash.New(memflash.Config{Size: 100})
	for _, tc := range []struct {
		f      ota.Flash
		off, n int64
	}{
		{plain, -1, 1}, {plain, 0, -1}, {plain, 0, 101}, {plain, 100, 1}, {plain, 101, 0},
		{plain, 1, math.MaxInt64}, {plain, math.MaxInt64, 1}, {plain, math.MaxInt64, math.MaxInt64}, {plain, math.MinInt64, 1},
		{f, 1, 4095}, {f, 0, 4095}, {f, 4096, 1},
	} {
		_, err := ota.Region(tc.f, tc.off, tc.n)
		require.ErrorIs(t, err, ota.ErrInvalid, "%d bytes at %d", tc.n, tc.off)
	}
	for _, tc := range []struct {
		f      ota.Flash
		off, n int64
	}{{plain, 0, 100}, {plain, 100, 0}, {plain, 99, 1}, {f, 0, 0}, {f, 4096, 8192}} {
		r, err := ota.Region(tc.f, tc.off, tc.n)
		require.NoError(t, err)
		require.Equal(t, tc.n, r.Size())
	}
}

// What comes from outside stays on one line, of bounded length.
func TestQuote(t *testing.T) {
	for in, want := range map[string]string{
		"":                         `""`,
		"v1.2":                     `"v1.2"`,
		"a\r\nb":                   `"a\r\nb"`,
		"\x1b[2J":                  `"\x1b[2J"`,
		"\u202egnp.exe":            `"\u202egnp.exe"`,
		"\xff":                     `"\xff"`,
		`"`:                        `"\""`,
		strings.Repeat("x", 64):    `"` + strings.Repeat("x", 64) + `"`,
		strings.Repeat("x", 1<<20): `"` + strings.Repeat("x", 64) + `"…`,
	} {
		require.Equal(t, want, ota.Quote(in))
	}
}
