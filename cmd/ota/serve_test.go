package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/fetch"
)

// What serve serves can be fetched: at any place, not at all by a device that runs
// it, and not half of one file and half of another.
func TestServeAndFetch(t *testing.T) {
	dir := t.TempDir()
	app := make([]byte, 300_000)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(app)
	part := filepath.Join(dir, "app.bin")
	require.NoError(t, os.WriteFile(part, app, 0o600))
	name := filepath.Join(dir, "fw.zip")
	create := func(version string) []byte {
		code, _, msg := tool(t, false, "create", "-o", name, "-name", "demo", "-platform", "gw", "-version", version,
			"-build-id", "x", "-part", "app="+part)
		require.Zero(t, code, msg)
		b, err := os.ReadFile(name)
		require.NoError(t, err)
		return b
	}
	zip := create("1.0")

	ctx, cancel := context.WithCancel(t.Context())
	out, in := io.Pipe()
	e := &env{stdin: strings.NewReader(""), stdout: in, stderr: io.Discard, getenv: func(string) string { return "" }}
	served := make(chan int, 1)
	go func() { served <- e.run(ctx, []string{"serve", "-listen", "127.0.0.1:0", dir}) }()
	defer func() {
		cancel()
		require.Zero(t, <-served)
	}()
	base, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	url := strings.TrimSpace(base) + "/fw.zip"

	o := &fetch.Options{Policy: &fetch.Policy{AllowHTTP: true, AllowLoopback: true}, Device: &fetch.Device{Platform: "gw", Version: "0.9", BuildID: "x"}}
	f, err := fetch.Open(ctx, url, o)
	require.NoError(t, err)
	defer f.Close()
	require.True(t, f.Ranged())
	require.EqualValues(t, len(zip), f.Size())
	r, err := f.Stream(ctx)
	require.NoError(t, err)
	b, err := io.ReadAll(r)
	require.NoError(t, err)
	require.NoError(t, r.Close())
	require.True(t, bytes.Equal(zip, b))
	rs := []ota.Range{{Off: 10, Len: 10}, {Off: 100_000, Len: 1000}, {Off: f.Size() - 5, Len: 5}}
	read := func() ([]byte, error) {
		r, err := f.Ranges(ctx, rs)
		require.NoError(t, err)
		defer r.Close()
		return io.ReadAll(r)
	}
	b, err = read()
	require.NoError(t, err)
	require.Equal(t, string(zip[10:20])+string(zip[100_000:101_000])+string(zip[len(zip)-5:]), string(b))

	// The device that runs it.
	_, err = fetch.Open(ctx, url, &fetch.Options{Policy: o.Policy, Device: &fetch.Device{Platform: "gw", Version: "1.0", BuildID: "x"}})
	require.ErrorIs(t, err, fetch.ErrNotModified)
	_, err = fetch.Open(ctx, url+".missing", o)
	var status *fetch.StatusError
	require.ErrorAs(t, err, &status)
	require.Equal(t, http.StatusNotFound, status.Code)

	// Replaced meanwhile, by one of the same size.
	require.Len(t, create("1.1"), len(zip))
	_, err = read()
	require.ErrorIs(t, err, fetch.ErrChanged)
}
