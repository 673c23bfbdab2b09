package main

import (
	"io"
	"runtime"
	"strings"
	"testing"

	"github.com/slotota/ota/bundle"
	"github.com/stretchr/testify/require"
)

// The content of a compressed part is read at any place, at the cost of decoding it
// again to go back.
func TestContent(t *testing.T) {
	opened, data := 0, "0123456789"
	c := &content{size: 10, open: func() (io.ReadCloser, error) {
		opened++
		return io.NopCloser(strings.NewReader(data)), nil
	}}
	defer c.close()
	for _, step := range []struct {
		off, n int64
		want   string
		err    error
		opened int
	}{
		{0, 4, "0123", nil, 1},
		{4, 2, "45", nil, 1},
		{8, 5, "89", io.EOF, 1},
		{10, 1, "", io.EOF, 1},
		{2, 3, "234", nil, 2},
		{0, 10, "0123456789", nil, 3},
	} {
		p := make([]byte, step.n)
		n, err := c.ReadAt(p, step.off)
		require.Equal(t, step.want, string(p[:n]))
		require.Equal(t, step.err, err)
		require.Equal(t, step.opened, opened)
	}
	all, err := io.ReadAll(io.NewSectionReader(c, 0, c.Size()))
	require.NoError(t, err)
	require.Equal(t, data, string(all))

	data = "012"
	for _, off := range []int64{1, 5} {
		_, err := c.ReadAt(make([]byte, 4), off)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	}
}

// However many processors there are, encoders do not take all memory.
func TestWorkers(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8))
	require.Equal(t, 8, (&packing{}).workers())
	for _, h := range []bundle.Packing{
		{Encoding: bundle.EncodingZstd, Level: 19},
		{Encoding: bundle.EncodingZstd, Frame: 4 << 20, Level: 19},
		{Encoding: bundle.EncodingZstd, Frame: bundle.MaxFrame},
	} {
		k := packing{how: map[string]bundle.Packing{"a": h}}
		require.LessOrEqual(t, k.workers(), 2)
		require.Positive(t, k.workers())
	}
}
