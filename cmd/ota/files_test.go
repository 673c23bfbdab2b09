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

// keyring makes keys, a bundle signed by them and a trust record, and returns the path
// of a file beside them.
func keyring(t *testing.T) (in func(name string) string) {
	t.Helper()
	dir := t.TempDir()
	in = func(name string) string { return filepath.Join(dir, name) }
	require.NoError(t, os.WriteFile(in("app.bin"), []byte("firmware"), 0o600))
	for _, args := range [][]string{
		{"keygen", "-o", in("k.pem")},
		{"keygen", "-type", "note", "-name", "n", "-o", in("n.key")},
		{"keygen", "-type", "note", "-name", "r", "-o", in("r.key")},
		{"create", "-o", in("fw.zip"), "-platform", "p", "-version", "1", "-part", "app=" + in("app.bin"), "-sign", in("k.pem"), "-note", in("n.key")},
		{"trust", "init", "-o", in("trust"), "-root", in("r.pub"), "-release", in("n.pub"), "-note", in("r.key")},
	} {
		code, _, msg := tool(t, false, args...)
		require.Zero(t, code, msg)
	}
	return in
}

// Keys and other files that are read are not what is written to.
func TestOutputIsKey(t *testing.T) {
	in := keyring(t)
	require.NoError(t, os.WriteFile(in("text.sig"), make([]byte, 64), 0o600))
	require.NoError(t, os.Link(in("k.pem"), in("link.pem")))
	read := func() map[string]string {
		all := map[string]string{}
		list, err := os.ReadDir(in(""))
		require.NoError(t, err)
		for _, f := range list {
			b, err := os.ReadFile(in(f.Name()))
			require.NoError(t, err)
			all[f.Name()] = string(b)
		}
		return all
	}
	before := read()
	create := []string{"create", "-platform", "p", "-version", "1", "-part", "app=" + in("app.bin")}
	sign, record := []string{"sign", in("fw.zip")}, []string{"trust", "sign", in("trust")}
	for _, c := range []struct {
		args []string
		out  string
	}{
		{append(create, "-sign", in("k.pem")), "k.pem"},
		{append(create, "-sign", "3="+in("k.pem")), "k.pem"},
		{append(create, "-sign", in("link.pem")), "k.pem"},
		{append(create, "-note", in("n.key")), "n.key"},
		{append(sign, "-key", in("k.pem")), "k.pem"},
		{append(sign, "-key", "0="+in("k.pem")), "link.pem"},
		{append(sign, "-note", in("n.key")), "n.key"},
		{append(sign, "-attach", in("text.sig"), "-by", in("n.pub")), "text.sig"},
		{append(sign, "-attach", in("text.sig"), "-by", in("n.pub")), "n.pub"},
		{append(record, "-note", in("r.key")), "r.key"},
	} {
		code, _, msg := tool(t, false, append(c.args, "-o", in(c.out))...)
		require.Equal(t, exitUsage, code, "%v %s", c.args, msg)
		require.Contains(t, msg, "-o must be another file")
		require.Equal(t, before, read(), "%v", c.args)
	}
	// A bundle or a record may take the place of the one that it is made from.
	for _, args := range [][]string{
		append(sign, "-key", in("k.pem"), "-o", in("fw.zip")),
		append(record, "-note", in("r.key"), "-o", in("trust")),
	} {
		code, _, msg := tool(t, false, args...)
		require.Zero(t, code, msg)
	}
}

// A signature that is removed leaves its place to the next one.
func TestSignInPlaceOfRemoved(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	run := func(args ...string) string {
		code, out, msg := tool(t, false, args...)
		require.Zero(t, code, msg)
		return out
	}
	require.NoError(t, os.WriteFile(in("app.bin"), []byte("firmware"), 0o600))
	for _, k := range []string{"a", "b", "c"} {
		run("keygen", "-o", in(k+".pem"))
	}
	run("create", "-o", in("fw.zip"), "-platform", "p", "-version", "1", "-part", "app="+in("app.bin"), "-sign", in("a.pem"), "-sign", in("b.pem"))
	require.Contains(t, run("sign", "-remove", "sig0", "-key", in("c.pem"), in("fw.zip")), "fw.zip  sig0 by ")
	run("verify", "-key", in("c.pub.pem"), "-key", in("b.pub.pem"), in("fw.zip"))
	require.Contains(t, run("sign", "-key", in("a.pem"), in("fw.zip")), "fw.zip  sig2 by ")
}
