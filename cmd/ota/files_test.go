package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
)

// What -o names stays what it is, if it is no regular file: root, who may replace
// /dev/null by a file, must not do so by accident.
func TestOutputInPlace(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("Windows has no /dev/fd, and links need a privilege")
	}
	dir := t.TempDir()
	app, target, latest, sock := filepath.Join(dir, "app.bin"), filepath.Join(dir, "fw-1.zip"), filepath.Join(dir, "latest.zip"), filepath.Join(dir, "s")
	require.NoError(t, os.WriteFile(app, make([]byte, 1000), 0o600))
	require.NoError(t, os.WriteFile(target, nil, 0o600))
	require.NoError(t, os.Symlink("fw-1.zip", latest))
	l, err := net.Listen("unix", sock)
	require.NoError(t, err)
	defer l.Close()
	for _, compress := range []string{"none", "zstd"} {
		create := func(name string) (code int, msg string) {
			code, _, msg = tool(t, false, "create", "-o", name, "-platform", "p", "-version", "1", "-compress", compress, "-part", "app="+app)
			return code, msg
		}
		code, msg := create(latest)
		require.Zero(t, code, msg)
		info, err := os.Lstat(latest)
		require.NoError(t, err)
		require.Equal(t, os.ModeSymlink, info.Mode().Type(), "the link was replaced")
		want, err := os.ReadFile(target)
		require.NoError(t, err)
		code, out, _ := tool(t, false, "verify", "-allow-unsigned", target)
		require.Zero(t, code, out)

		r, w, err := os.Pipe()
		require.NoError(t, err)
		read := make(chan []byte, 1)
		go func() {
			b, _ := io.ReadAll(r) // compared below
			read <- b
		}()
		code, msg = create(fmt.Sprintf("/dev/fd/%d", w.Fd()))
		require.NoError(t, w.Close())
		require.Equal(t, want, <-read)
		require.Zero(t, code, msg)
		require.NoError(t, r.Close())

		code, msg = create(sock) // cannot be opened
		require.Equal(t, exitFailed, code)
		require.Contains(t, msg, sock)
		info, err = os.Lstat(sock)
		require.NoError(t, err)
		require.Equal(t, os.ModeSocket, info.Mode().Type(), "the socket was replaced")
		code, msg = create(dir)
		require.Equal(t, exitFailed, code)
		require.Contains(t, msg, "is a directory")
	}
	all, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, all, 4, "temporary files are left")
}

// What a bundle is made from is not what it is written to.
func TestOutputIsInput(t *testing.T) {
	dir := t.TempDir()
	app, other := filepath.Join(dir, "app.bin"), filepath.Join(dir, "other.bin")
	require.NoError(t, os.WriteFile(app, []byte("firmware"), 0o600))
	require.NoError(t, os.WriteFile(other, []byte("x"), 0o600))
	for _, args := range [][]string{
		{"-o", app, "-part", "app=" + app},
		{"-o", filepath.Join(dir, ".", "app.bin"), "-part", "app=" + app},
		{"-o", app, "-dir", dir}, // which would become a part of itself
	} {
		code, _, msg := tool(t, false, append([]string{"create", "-platform", "p", "-version", "1"}, args...)...)
		require.Equal(t, exitUsage, code, "%v", args)
		require.Contains(t, msg, "app.bin")
		b, err := os.ReadFile(app)
		require.NoError(t, err)
		require.Equal(t, "firmware", string(b))
	}

	// Nor is a part made from two files, of which one would be lost.
	zip := filepath.Join(dir, "fw.zip")
	code, _, msg := tool(t, false, "create", "-o", zip, "-platform", "p", "-version", "1", "-part", "app="+app, "-part", "app="+other)
	require.Equal(t, exitUsage, code)
	require.Contains(t, msg, `part "app": two files`)
	code, _, msg = tool(t, false, "create", "-o", zip, "-platform", "p", "-version", "1", "-part", "app="+app, "-part", "app,type=app")
	require.Zero(t, code, msg)
	// A bundle may take the place of the one that it is made from.
	code, _, msg = tool(t, false, "create", "-o", zip, "-from", zip, "-version", "2")
	require.Zero(t, code, msg)
}
