package fetch

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
)

func TestLocal(t *testing.T) {
	data := content(100_000)
	name := filepath.Join(t.TempDir(), "fw 1%.zip")
	require.NoError(t, os.WriteFile(name, data, 0o600))
	slashed := filepath.ToSlash(name)
	if slashed[0] != '/' {
		slashed = "/" + slashed
	}
	rawURL := "file://" + slashed[:len(slashed)-len("fw 1%.zip")] + "fw%201%25.zip"

	for _, p := range []*Policy{nil, {AllowHTTP: true, AllowLoopback: true, AllowPrivate: true}} {
		_, err := Open(t.Context(), rawURL, &Options{Policy: p})
		require.ErrorIs(t, err, ErrPolicy)
	}
	o := &Options{Policy: &Policy{AllowFile: true}}
	rnd := rand.New(rand.NewPCG(3, 4))
	for _, open := range []func() (*File, error){
		func() (*File, error) { return OpenFile(name) },
		func() (*File, error) { return Open(t.Context(), rawURL, o) },
	} {
		f, err := open()
		require.NoError(t, err)
		require.EqualValues(t, len(data), f.Size())
		require.True(t, f.Ranged())
		for range 20 {
			rs := randomRanges(rnd, f.Size())
			r, err := f.Ranges(t.Context(), rs)
			require.NoError(t, err)
			got, err := io.ReadAll(r)
			require.NoError(t, err)
			require.True(t, bytes.Equal(pick(data, rs), got))
			require.NoError(t, r.Close())
			_, err = r.Read(make([]byte, 1))
			require.ErrorIs(t, err, fs.ErrClosed)
		}
		r, err := f.Stream(t.Context())
		require.NoError(t, err)
		got, err := io.ReadAll(r)
		require.NoError(t, err)
		require.True(t, bytes.Equal(data, got))
		require.Zero(t, f.Downloaded())
		_, err = f.Ranges(t.Context(), []ota.Range{{Off: f.Size(), Len: 1}})
		require.ErrorIs(t, err, ota.ErrInvalid)
		ctx, cancel := context.WithCancelCause(t.Context())
		r, err = f.Stream(ctx)
		require.NoError(t, err)
		boom := errors.New("boom")
		cancel(boom)
		_, err = io.ReadAll(r)
		require.ErrorIs(t, err, boom)
		require.NoError(t, f.Close())
	}

	// Changed while it is read, or between readers.
	for how, change := range map[string]func(f *os.File) error{
		"shorter": func(f *os.File) error { return f.Truncate(50_000) },
		"longer":  func(f *os.File) error { return f.Truncate(100_001) },
		"touched": func(*os.File) error { return os.Chtimes(name, time.Now(), time.Now().Add(time.Hour)) },
	} {
		require.NoError(t, os.WriteFile(name, data, 0o600))
		f, err := OpenFile(name)
		require.NoError(t, err)
		r, err := f.Stream(t.Context())
		require.NoError(t, err)
		_, err = io.ReadFull(r, make([]byte, 1000))
		require.NoError(t, err)
		w, err := os.OpenFile(name, os.O_WRONLY, 0)
		require.NoError(t, err)
		require.NoError(t, change(w))
		require.NoError(t, w.Close())
		_, err = io.ReadAll(r)
		require.ErrorIs(t, err, ErrChanged, how)
		var e *Error
		require.ErrorAs(t, err, &e)
		r, err = f.Ranges(t.Context(), []ota.Range{{Off: 0, Len: 1}})
		require.NoError(t, err)
		_, err = io.ReadAll(r)
		require.ErrorIs(t, err, ErrChanged, how)
		require.NoError(t, f.Close())
	}

	_, err := Open(t.Context(), rawURL, &Options{Policy: o.Policy, MaxSize: 10})
	require.ErrorIs(t, err, ErrTooLarge)
	_, err = OpenFile(name + ".missing")
	require.ErrorIs(t, err, fs.ErrNotExist)
	checkText(t, err, "")
	_, err = OpenFile(t.TempDir())
	require.ErrorIs(t, err, errNotRegular)
	if runtime.GOOS != "windows" {
		_, err = OpenFile(os.DevNull)
		require.ErrorIs(t, err, errNotRegular)
	}
	for u, want := range map[string]error{
		"file:fw.zip": ErrURL, "file:": ErrURL, "file://": ErrURL, "file://server/share/fw.zip": ErrURL, "file:///fw.zip?x": ErrURL,
		"file://u@localhost/x": ErrURL, "FILE:///nowhere/at/all": fs.ErrNotExist, "file://localhost/nowhere/at/all": fs.ErrNotExist,
		"fw.zip": ErrURL, "ftp://h/": ErrPolicy,
	} {
		_, err := Open(t.Context(), u, o)
		require.ErrorIs(t, err, want, u)
	}
}

func TestNewFile(t *testing.T) {
	src := &closed{Reader: bytes.NewReader([]byte("hello"))}
	f := NewFile(src, -5)
	require.EqualValues(t, -1, f.Size())
	require.False(t, f.Ranged())
	_, err := f.Ranges(t.Context(), nil)
	require.ErrorIs(t, err, ErrNoRanges)
	r, err := f.Stream(t.Context())
	require.NoError(t, err)
	b, err := io.ReadAll(r)
	require.NoError(t, err)
	require.Equal(t, "hello", string(b))
	_, err = f.Stream(t.Context())
	require.ErrorIs(t, err, ErrNoRanges)
	require.False(t, src.is)
	require.NoError(t, f.Close())
	require.True(t, src.is)
	require.NoError(t, f.Close())

	f = NewFile(bytes.NewReader([]byte("hello")), 5)
	require.EqualValues(t, 5, f.Size())
	ctx, cancel := context.WithCancel(t.Context())
	r, err = f.Stream(ctx)
	require.NoError(t, err)
	cancel()
	_, err = io.ReadAll(r)
	require.ErrorIs(t, err, context.Canceled)
	require.NoError(t, r.Close())
}
