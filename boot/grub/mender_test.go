package grub

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/filelock"
	"github.com/slotota/ota/internal/fsys"
	"github.com/slotota/ota/internal/loadertest"
)

// menderBoard are variables that nobody may lose; they reach into the second sector.
var menderBoard = map[string]string{"mender_systemd_machine_id": strings.Repeat("0123456789abcdef", 2), "note": strings.Repeat("n", 600)}

// menderFiles returns the content of one copy.
func menderFiles(t testing.TB, vars ...string) map[string][]byte {
	block := func(pairs ...string) []byte {
		e := NewBlock()
		for i := 0; i < len(pairs); i += 2 {
			require.NoError(t, e.Set(pairs[i], pairs[i+1]))
		}
		b, err := e.Bytes()
		require.NoError(t, err)
		return b
	}
	pairs := []string{"note", menderBoard["note"], "mender_systemd_machine_id", menderBoard["mender_systemd_machine_id"]}
	lock := block("editing", "0")
	return map[string][]byte{
		"env":            block(append(pairs, vars...)...),
		"lock":           lock,
		"lock.sha256sum": fmt.Appendf(nil, "%x  lock\n", sha256.Sum256(lock)),
	}
}

var initial = []string{"bootcount", "0", "mender_boot_part", "2", "upgrade_available", "0"}

// grubScripts does what Mender's scripts for GRUB do. What GRUB cannot write to
// stays as it is.
type grubScripts struct {
	files fsys.FS
	vars  map[string]string
}

func (g *grubScripts) load(name string, vars ...string) error {
	b, err := g.files.ReadFile(name)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	e, err := ParseBlock(b)
	if err != nil {
		return nil
	}
	for _, n := range vars {
		if v, ok := e.Get(n); ok {
			g.vars[n] = v
		}
	}
	return nil
}

func (g *grubScripts) save(name string, vars ...string) error {
	b, err := g.files.ReadFile(name)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	e, err := ParseBlock(b)
	if err != nil {
		return nil
	}
	for _, n := range vars {
		if v, ok := g.vars[n]; ok {
			err = e.Set(n, v)
		} else {
			e.Unset(n)
		}
		if err != nil {
			return err
		}
	}
	if b, err = e.Bytes(); err != nil {
		return err
	}
	return g.files.Overwrite(name, b)
}

// steps runs functions until one fails.
func steps(fs ...func() error) error {
	for _, f := range fs {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

func (g *grubScripts) editing(k int, v string) func() error {
	return func() error {
		g.vars["editing"] = v
		return g.save(fmt.Sprintf("/b/mender_grubenv%d/lock", k), "editing")
	}
}

func (g *grubScripts) env(do func(string, ...string) error, k int) func() error {
	return func() error {
		return do(fmt.Sprintf("/b/mender_grubenv%d/env", k), "bootcount", "mender_boot_part", "upgrade_available", "mender_systemd_machine_id")
	}
}

func (g *grubScripts) boot() (string, error) {
	for _, k := range []int{2, 1} {
		g.vars["editing"] = "invalid"
		if err := g.load(fmt.Sprintf("/b/mender_grubenv%d/lock", k), "editing"); err != nil {
			return "", err
		}
		if g.vars["editing"] != "0" {
			if err := steps(g.env(g.load, 3-k), g.env(g.save, k), g.editing(k, "0")); err != nil {
				return "", err
			}
			break
		}
	}
	if err := g.env(g.load, 1)(); err != nil {
		return "", err
	}
	part := g.vars["mender_boot_part"]
	if part != "2" && part != "3" {
		return "", fmt.Errorf("the environment is corrupt: %v", g.vars)
	}
	if g.vars["upgrade_available"] != "1" {
		return part, nil
	}
	if g.vars["bootcount"] != "0" {
		g.vars["mender_boot_part"] = map[string]string{"2": "3", "3": "2"}[part]
		g.vars["upgrade_available"], g.vars["bootcount"] = "0", "0"
	} else {
		g.vars["bootcount"] = "1"
	}
	return g.vars["mender_boot_part"], steps(g.editing(2, "1"), g.env(g.save, 2), g.editing(2, "0"), g.editing(1, "1"), g.env(g.save, 1), g.editing(1, "0"))
}

func menderLoader(t *testing.T) loadertest.Loader {
	content := menderFiles(t, initial...)
	open := func(s fsys.FS, running func(context.Context) (ota.SlotID, error)) (*Mender, error) {
		return NewMender(&MenderConfig{Dir: "/b", Parts: [2]string{"2", "3"}, Running: running, files: s})
	}
	return loadertest.Loader{
		Name:    "mender",
		Flashes: []memflash.Config{{Size: fsys.SimSize}, {Size: fsys.SimSize}},
		Format: func(flashes []ota.Flash) error {
			s, err := fsys.NewSim(flashes, true)
			for _, dir := range []string{"/b/mender_grubenv1/", "/b/mender_grubenv2/"} {
				for n, b := range content {
					if err == nil {
						err = fsys.Replace(s, dir+n, b)
					}
				}
			}
			return err
		},
		Open: func(flashes []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error) {
			s, err := fsys.NewSim(flashes, false)
			if err != nil {
				return nil, err
			}
			if running == nil {
				running = func(context.Context) (ota.SlotID, error) { return 0, nil }
			}
			return open(s, running)
		},
		Boot: func(ctx context.Context, flashes []ota.Flash) (ota.SlotID, error) {
			s, err := fsys.NewSim(flashes, true)
			if err != nil {
				return ota.NoSlot, err
			}
			part, err := (&grubScripts{files: s, vars: map[string]string{}}).boot()
			return ota.SlotID(strings.Index("23", part)), err
		},
		Intact: func(flashes []ota.Flash) error {
			s, err := fsys.NewSim(flashes, false)
			if err != nil {
				return err
			}
			d, err := open(s, func(context.Context) (ota.SlotID, error) { return 0, nil })
			if err != nil {
				return err
			}
			v, err := d.load()
			if err != nil {
				return err
			}
			for n, want := range menderBoard {
				if got, ok := v.env[v.counts()].Get(n); !ok || got != want {
					return fmt.Errorf("variable %s is %q", n, got)
				}
			}
			return nil
		},
		Replay: *replay, Twice: *long,
	}
}

func TestMenderConformance(t *testing.T) {
	l := menderLoader(t)
	l.Conformance(t)
}

func TestMenderPowerCuts(t *testing.T) {
	l := menderLoader(t)
	l.PowerCuts(t)
}

// menderSetup writes two copies to a directory and returns a driver for it.
func menderSetup(t *testing.T, one, two map[string][]byte) *Mender {
	root := t.TempDir()
	for dir, files := range map[string]map[string][]byte{"mender_grubenv1": one, "mender_grubenv2": two} {
		require.NoError(t, os.MkdirAll(filepath.Join(root, "b", dir), 0o700))
		for n, b := range files {
			require.NoError(t, os.WriteFile(filepath.Join(root, "b", dir, n), b, 0o600))
		}
	}
	d, err := NewMender(&MenderConfig{
		Dir: "/b", Parts: [2]string{"2", "3"}, LockFile: filepath.Join(root, "lock"), files: fsys.OS{Root: root},
		Running: func(context.Context) (ota.SlotID, error) { return 0, nil },
	})
	require.NoError(t, err)
	return d
}

// TestMenderRepair: whatever a program left behind, the copy that GRUB would act on
// counts, and a write makes both whole.
func TestMenderRepair(t *testing.T) {
	ctx := t.Context()
	good := func() map[string][]byte { return menderFiles(t, initial...) }
	newer := func() map[string][]byte {
		return menderFiles(t, "bootcount", "0", "mender_boot_part", "3", "upgrade_available", "1")
	}
	locked := func(m map[string][]byte) map[string][]byte {
		m["lock"] = bytes.Replace(m["lock"], []byte("editing=0"), []byte("editing=1"), 1)
		return m
	}
	with := func(m map[string][]byte, name string, b []byte) map[string][]byte {
		if m[name] = b; b == nil {
			delete(m, name)
		}
		return m
	}
	committed := driver.Choice{Active: 0, Revert: ota.NoSlot, Worn: true}
	trial := driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}
	for name, tc := range map[string]struct {
		one, two map[string][]byte
		want     driver.Choice
	}{
		"whole":                {good(), good(), driver.Choice{Active: 0, Revert: ota.NoSlot}},
		"copy 2 being written": {good(), locked(newer()), committed},
		"copy 2 written":       {good(), newer(), committed},
		"copy 1 being written": {locked(good()), newer(), trial},
		"both locked":          {locked(good()), locked(newer()), committed},
		"copy 2 torn":          {good(), with(good(), "env", []byte("half")), committed},
		"copy 2 gone":          {good(), nil, committed},
		"no lock":              {good(), with(newer(), "lock", nil), committed},
		"empty lock":           {with(good(), "lock", []byte{}), newer(), trial},
		"copy 1 torn":          {locked(with(good(), "env", nil)), newer(), trial},
	} {
		t.Run(name, func(t *testing.T) {
			d := menderSetup(t, tc.one, tc.two)
			c, err := d.Read(ctx)
			require.NoError(t, err)
			require.Equal(t, tc.want, c)
			for _, next := range []driver.Choice{{Active: 1, Trial: true, Revert: 0, Booted: true}, {Active: 1, Revert: ota.NoSlot}} {
				require.NoError(t, d.Write(ctx, next))
				c, err = d.Read(ctx)
				require.NoError(t, err)
				require.Equal(t, next, c)
				v, err := d.load()
				require.NoError(t, err)
				require.False(t, v.worn())
				locks, err := v.locks()
				require.NoError(t, err)
				require.Equal(t, good()["lock"], locks[0])
			}
		})
	}
	d := menderSetup(t, with(good(), "env", []byte("half")), with(good(), "env", []byte("half")))
	_, err := d.Read(ctx)
	require.ErrorIs(t, err, ota.ErrBadBootState)
	require.ErrorIs(t, d.Write(ctx, trial), ota.ErrBadBootState)
	d = menderSetup(t, nil, nil)
	_, err = d.Read(ctx)
	require.ErrorIs(t, err, ota.ErrNoBootState)
	require.ErrorIs(t, d.Write(ctx, trial), ota.ErrNoBootState)
	for _, vars := range [][]string{{"bootcount", "2", "mender_boot_part", "2", "upgrade_available", "0"}, {"bootcount", "0", "mender_boot_part", "4", "upgrade_available", "0"}, {"mender_boot_part", "2"}} {
		d = menderSetup(t, menderFiles(t, vars...), menderFiles(t, vars...))
		_, err = d.Read(ctx)
		require.ErrorIs(t, err, ota.ErrBadBootState)
		require.NoError(t, d.Write(ctx, trial))
	}
	for _, c := range []driver.Choice{{Active: 2}, {Active: 1, Trial: true, Revert: ota.NoSlot}, {Active: -1}} {
		require.ErrorIs(t, d.Write(ctx, c), ota.ErrUnknownSlot)
	}
	require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 1, Trial: true, Tries: 2}), ota.ErrInvalid)
}

// TestMenderTools: what the driver writes passes the checks of Mender's tools.
func TestMenderTools(t *testing.T) {
	for tool, pkg := range map[string]string{"grub-editenv": "grub-common", "sha256sum": "coreutils"} {
		if _, err := exec.LookPath(tool); err != nil {
			msg := tool + " is not installed: apt-get install " + pkg
			if os.Getenv("CI") == "true" {
				t.Fatal(msg)
			}
			t.Skip(msg)
		}
	}
	d := menderSetup(t, menderFiles(t, initial...), nil)
	require.NoError(t, d.Write(t.Context(), driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}))
	root := d.c.files.(fsys.OS).Root
	for _, k := range []string{"1", "2"} {
		dir := filepath.Join(root, "b", "mender_grubenv"+k)
		out, err := exec.Command("grub-editenv", filepath.Join(dir, "env"), "list").CombinedOutput()
		require.NoError(t, err, "%s", out)
		for _, l := range []string{"mender_boot_part=3", "upgrade_available=1", "bootcount=0", "note=" + menderBoard["note"]} {
			require.Contains(t, "\n"+string(out), "\n"+l+"\n")
		}
		sum := exec.Command("sha256sum", "-c", filepath.Join(root, "b", "mender_grubenv1", "lock.sha256sum"))
		sum.Dir = dir
		out, err = sum.CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
}

func TestMenderLock(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no file locks here")
	}
	d := menderSetup(t, menderFiles(t, initial...), menderFiles(t, initial...))
	unlock, err := filelock.Lock(t.Context(), []string{d.c.LockFile})
	require.NoError(t, err)
	ctx, cancel := context.WithCancelCause(t.Context())
	go cancel(errors.New("enough"))
	_, err = d.Read(ctx)
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorIs(t, d.Write(ctx, driver.Choice{Active: 1, Revert: ota.NoSlot}), context.Canceled)
	unlock()
	_, err = d.Read(t.Context())
	require.NoError(t, err)
}

func TestNewMender(t *testing.T) {
	run := func(context.Context) (ota.SlotID, error) { return 0, nil }
	for _, c := range []*MenderConfig{
		nil, {Parts: [2]string{"2", "2"}, Running: run, Dir: "/b"}, {Parts: [2]string{"2", "03"}, Running: run, Dir: "/b"},
		{Parts: [2]string{"2", "x"}, Running: run, Dir: "/b"}, {Parts: [2]string{"2", "3"}, Dir: "/b"},
		{Parts: [2]string{"2", "3"}, Roots: [2]string{"/dev/a", "/dev/a"}, Dir: "/b"},
	} {
		_, err := NewMender(c)
		require.ErrorIs(t, err, ota.ErrInvalid)
	}
	files := fsys.OS{Root: t.TempDir()}
	c := &MenderConfig{Parts: [2]string{"2", "3"}, Roots: [2]string{"/dev/a", "/dev/b"}, files: files}
	_, err := NewMender(c)
	require.ErrorIs(t, err, ota.ErrNoBootState)
	write := func(name, content string) {
		p := filepath.Join(files.Root, filepath.FromSlash(name))
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o700))
		require.NoError(t, os.WriteFile(p, []byte(content), 0o600))
	}
	write("/boot/grub/mender_grubenv1/env", "")
	d, err := NewMender(c)
	require.NoError(t, err)
	require.Equal(t, "/boot/grub", d.c.Dir)
	write("/etc/mender_grubenv.config", "# x\nENV_DIR = /elsewhere\nOTHER=1\n")
	d, err = NewMender(c)
	require.NoError(t, err)
	require.Equal(t, "/elsewhere", d.c.Dir)
	require.Equal(t, menderLock, d.c.LockFile)
}
