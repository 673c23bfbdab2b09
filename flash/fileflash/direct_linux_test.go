package fileflash

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/slotota/ota"
	"github.com/stretchr/testify/require"
)

var (
	_ ota.DirectReader = (*File)(nil)
	_ ota.Zeroer       = (*File)(nil)
	_ ota.IOSizer      = (*File)(nil)
)

// places calls fn with a file and, where permitted, a block device, both of n bytes.
func places(t *testing.T, n int, fn func(t *testing.T, f *File)) {
	t.Run("file", func(t *testing.T) {
		fn(t, openT(t, filepath.Join(t.TempDir(), "slot"), &Options{Size: int64(n), Create: true}))
	})
	t.Run("block device", func(t *testing.T) {
		dev, _ := loopDevice(t, n)
		fn(t, openT(t, dev, nil))
	})
}

// Whatever the alignment, what was written is what all ways to read it show.
func TestDirect(t *testing.T) {
	const size = 1<<20 + 3*512
	places(t, size, func(t *testing.T, f *File) {
		direct := f.DirectReader()
		if direct == nil {
			t.Skip("the file system here has no O_DIRECT")
		}
		model := make([]byte, size)
		_, err := f.WriteAt(model, 0)
		require.NoError(t, err)
		rng := rand.New(rand.NewPCG(1, 2))
		memory := aligned(300_000)
		for i := range 150 {
			off, n := rng.IntN(size), 1+rng.IntN(100_000)
			skip := rng.IntN(pageSize)
			if i%2 == 0 {
				off, skip = off&^(pageSize-1), 0
			}
			n = min(n, size-off)
			p := memory[skip : skip+n]
			for k := range p {
				p[k] = byte(rng.Uint32())
			}
			copy(model[off:], p)
			m, err := f.WriteAt(p, int64(off))
			require.NoError(t, err)
			require.Equal(t, n, m)

			off, n, skip = rng.IntN(size), 1+rng.IntN(150_000), rng.IntN(pageSize)
			if i%3 == 0 {
				off, skip = off&^(pageSize-1), 0
			}
			for _, r := range []io.ReaderAt{f, direct} {
				p := memory[skip : skip+n]
				clear(p)
				m, err := r.ReadAt(p, int64(off))
				want := model[off:min(off+n, size)]
				if len(want) < n {
					require.Equal(t, io.EOF, err)
				} else {
					require.NoError(t, err)
				}
				require.Equal(t, len(want), m)
				require.True(t, bytes.Equal(want, p[:m]), "%d bytes at %d", n, off)
			}
		}
		require.NoError(t, f.Sync())
		_, err = direct.ReadAt(make([]byte, 1), -1)
		require.ErrorIs(t, err, ota.ErrInvalid)
		_, err = direct.ReadAt(make([]byte, 1), size)
		require.Equal(t, io.EOF, err)
		require.NoError(t, f.Close())
		_, err = direct.ReadAt(make([]byte, 1), 0)
		require.ErrorIs(t, err, os.ErrClosed)
	})
}

// picky refuses to write past the cache what does not please it, after some of it.
type picky struct {
	handle
	after   int
	err     error
	refused int
}

func (p *picky) WriteAt(b []byte, off int64) (int, error) {
	p.refused++
	n, err := p.handle.WriteAt(b[:min(p.after, len(b))], off)
	if err == nil {
		err = p.err
	}
	return n, err
}

// Where the file system takes O_DIRECT, but not for this write, it goes through the
// cache, and what is read past it is the same. Other errors come through.
func TestDirectRefused(t *testing.T) {
	const size = 1 << 20
	places(t, size, func(t *testing.T, f *File) {
		if f.DirectReader() == nil {
			t.Skip("the file system here has no O_DIRECT")
		}
		p := aligned(64 << 10)
		for i := range p {
			p[i] = byte(i * 7)
		}
		refusing := &picky{handle: f.direct, err: &os.PathError{Op: "write", Err: syscall.EINVAL}}
		f.direct = refusing
		for i, after := range []int{0, 4096, 60 << 10} {
			refusing.after = after
			off := int64(i) * 128 << 10
			n, err := f.WriteAt(p, off)
			require.NoError(t, err)
			require.Equal(t, len(p), n)
			require.Equal(t, i+1, refusing.refused)
			for range 2 {
				got := aligned(len(p))
				_, err = f.DirectReader().ReadAt(got, off)
				require.NoError(t, err)
				require.True(t, bytes.Equal(p, got), "%d bytes were taken", after)
				require.NoError(t, f.Sync())
			}
		}
		refusing.err = syscall.EIO
		n, err := f.WriteAt(p, 0)
		require.ErrorIs(t, err, syscall.EIO)
		require.Equal(t, 60<<10, n)
	})
}

// Without a way past the cache, Sync has the system forget what it cached.
func TestSyncDropsTheCache(t *testing.T) {
	path := image(t, 1<<20)
	var st syscall.Statfs_t
	require.NoError(t, syscall.Statfs(path, &st))
	if st.Type == 0x01021994 {
		t.Skip("the folder for temporary files is a tmpfs, which is all cache; set TMPDIR")
	}
	if _, err := exec.LookPath("fincore"); err != nil && os.Getenv("CI") != "true" {
		t.Skip("needs fincore: apt-get install util-linux-extra")
	}
	cached := func() string {
		out, err := command(t, "fincore", "-n", "-b", "-o", "RES", path)
		require.NoError(t, err, out)
		return strings.TrimSpace(out)
	}
	f := openT(t, path, nil)
	if f.direct != nil {
		f.direct.Close()
		f.direct = nil
	}
	_, err := f.WriteAt(make([]byte, 1<<20), 0)
	require.NoError(t, err)
	require.NotEqual(t, "0", cached())
	require.NoError(t, f.Sync())
	require.Equal(t, "0", cached())
	require.Nil(t, f.DirectReader())
}

func TestZero(t *testing.T) {
	const size = 1 << 20
	places(t, size, func(t *testing.T, f *File) {
		full := bytes.Repeat([]byte{0xaa}, size)
		_, err := f.WriteAt(full, 0)
		require.NoError(t, err)
		require.NoError(t, f.Sync())
		for _, r := range []ota.Range{{Off: 0, Len: 512}, {Off: 4096, Len: 200_192}, {Off: size - 512, Len: 512}, {Off: 8192, Len: 0}} {
			err := f.Zero(r.Off, r.Len)
			if errors.Is(err, ota.ErrUnsupported) {
				t.Skip("neither files nor devices can be zeroed here: ", err)
			}
			require.NoError(t, err)
			clear(full[r.Off : r.Off+r.Len])
		}
		require.NoError(t, f.Sync())
		got := make([]byte, size)
		for _, r := range []io.ReaderAt{f, f.DirectReader()} {
			if r == nil {
				continue
			}
			_, err = r.ReadAt(got, 0)
			require.NoError(t, err)
			require.True(t, bytes.Equal(full, got))
		}
		require.ErrorIs(t, f.Zero(1, 512), ota.ErrUnsupported, "not whole sectors")
		require.ErrorIs(t, f.Zero(0, size+512), ota.ErrTooLarge)
		require.ErrorIs(t, f.Zero(-512, 512), ota.ErrInvalid)
		info, err := f.f.Stat()
		require.NoError(t, err)
		if info.Mode().IsRegular() {
			require.EqualValues(t, size, info.Size())
			require.GreaterOrEqual(t, info.Sys().(*syscall.Stat_t).Blocks*512, int64(size), "the space stays reserved")
		}
		broken := errors.New("broken")
		f.sync = func() error { return broken }
		require.Error(t, f.Sync())
		require.ErrorIs(t, f.Zero(0, 512), broken)
	})
	f := openT(t, image(t, 4096), &Options{ReadOnly: true})
	require.ErrorIs(t, f.Zero(0, 512), ota.ErrReadOnly)
}
