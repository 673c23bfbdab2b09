package grub

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/fsys"
	"github.com/slotota/ota/internal/loadertest"
)

var (
	long   = flag.Bool("crash.long", false, "cut the power twice as well")
	replay = flag.String("crash.replay", "", "repeat the run of this text")
)

func TestGolden(t *testing.T) {
	raw, err := os.ReadFile("testdata/grubenv.bin") // made by grub-editenv
	require.NoError(t, err)
	e, err := ParseBlock(raw)
	require.NoError(t, err)
	// Behind the comment line, too.
	for name, want := range map[string]string{"ORDER": "A B", "A_OK": "1", "A_TRY": "0", "weird": `back\slash`} {
		got, ok := e.Get(name)
		require.True(t, ok, name)
		require.Equal(t, want, got)
	}
	again, err := e.Bytes()
	require.NoError(t, err)
	require.Equal(t, raw, again)
}

func TestBlock(t *testing.T) {
	for _, bad := range []string{"", "x", "# GRUB environment block\n", signature + "a=b", signature + "novalue\n###", signature + "=x\n"} {
		_, err := ParseBlock([]byte(bad))
		require.ErrorIs(t, err, ErrFormat, "%q", bad)
	}
	e := NewBlock()
	for _, name := range []string{"", "a=b", "#a", "a\n", `a\`} {
		require.ErrorIs(t, e.Set(name, "x"), ota.ErrInvalid, "%q", name)
	}
	require.ErrorIs(t, e.Set("a", "\x00"), ota.ErrInvalid)
	require.NoError(t, e.Set("big", strings.Repeat("x", BlockSize)))
	_, err := e.Bytes()
	require.ErrorIs(t, err, ErrFull)
}

// board are variables that nobody may lose.
var board = map[string]string{"saved_entry": "debian", "next": "line\nend\\"}

func block(t testing.TB) []byte {
	e := NewBlock()
	e.lines = []line{{"", strings.TrimSuffix(warning, "\n")}}
	for _, n := range []string{"saved_entry", "next"} {
		require.NoError(t, e.Set(n, board[n]))
	}
	b, err := e.Bytes()
	require.NoError(t, err)
	return b
}

// script does what grub.cfg does; what save_env writes is one sector, in place.
func script(ctx context.Context, files fsys.FS) (string, error) {
	d, err := New(&Config{Path: "/grubenv", Names: []string{"A", "B"}, files: files})
	if err != nil {
		return "", err
	}
	for range 2 {
		e, err := d.load(ctx)
		if err != nil {
			return "", err
		}
		get := func(name, otherwise string) string {
			if v, ok := e.Get(name); ok {
				return v
			}
			return otherwise
		}
		order := strings.Fields(get("ORDER", "A"))
		last := order[len(order)-1]
		for _, n := range order {
			if get(n+"_OK", map[string]string{"A": "1"}[n]) != "1" || get(n+"_TRY", "0") != "0" {
				continue
			}
			if err := e.Set(n+"_TRY", "1"); err != nil {
				return "", err
			}
			b, err := e.Bytes()
			if err != nil {
				return "", err
			}
			return n, files.Overwrite("/grubenv", b)
		}
		if err := e.Set(last+"_TRY", "0"); err != nil {
			return "", err
		}
		b, err := e.Bytes()
		if err != nil {
			return "", err
		}
		if err := files.Overwrite("/grubenv", b); err != nil {
			return "", err
		}
	}
	return "", fmt.Errorf("no slot")
}

func loader(t *testing.T) loadertest.Loader {
	raw := block(t)
	return loadertest.Loader{
		Name:    "grub",
		Flashes: []memflash.Config{{Size: fsys.SimSize}, {Size: fsys.SimSize}},
		Format: func(flashes []ota.Flash) error {
			s, err := fsys.NewSim(flashes, true)
			if err != nil {
				return err
			}
			return fsys.Replace(s, "/grubenv", raw)
		},
		Open: func(flashes []ota.Flash, running func(context.Context) (ota.SlotID, error)) (driver.Driver, error) {
			s, err := fsys.NewSim(flashes, false)
			if err != nil {
				return nil, err
			}
			d, err := New(&Config{Path: "/grubenv", Names: []string{"A", "B"}, Running: running, files: s})
			return d, err
		},
		Boot: func(ctx context.Context, flashes []ota.Flash) (ota.SlotID, error) {
			s, err := fsys.NewSim(flashes, true)
			if err != nil {
				return ota.NoSlot, err
			}
			n, err := script(ctx, s)
			return ota.SlotID(slices.Index([]string{"A", "B"}, n)), err
		},
		Wears: true,
		Intact: func(flashes []ota.Flash) error {
			s, err := fsys.NewSim(flashes, false)
			if err != nil {
				return err
			}
			b, err := s.ReadFile("/grubenv")
			if err != nil {
				return err
			}
			e, err := ParseBlock(b)
			if err != nil {
				return err
			}
			for n, want := range board {
				if got, ok := e.Get(n); !ok || got != want {
					return fmt.Errorf("variable %s is %q", n, got)
				}
			}
			return nil
		},
		Replay: *replay, Twice: *long,
	}
}

func TestConformance(t *testing.T) {
	l := loader(t)
	l.Conformance(t)
}

func TestPowerCuts(t *testing.T) {
	l := loader(t)
	l.PowerCuts(t)
}

// TestTool: what grub-editenv writes is read here and the other way round.
func TestTool(t *testing.T) {
	tool, err := exec.LookPath("grub-editenv")
	if err != nil {
		const msg = "grub-editenv is not installed: apt-get install grub-common"
		if os.Getenv("CI") == "true" {
			t.Fatal(msg)
		}
		t.Skip(msg)
	}
	name := filepath.Join(t.TempDir(), "grubenv")
	out, err := exec.Command(tool, name, "create").CombinedOutput()
	require.NoError(t, err, "%s", out)
	d, err := New(&Config{Path: filepath.ToSlash(name), Names: []string{"A", "B"}})
	require.NoError(t, err)
	_, err = d.Read(t.Context())
	require.ErrorIs(t, err, ota.ErrNoBootState)

	rnd := rand.New(rand.NewPCG(3, 4))
	want := map[string]string{}
	for i := range 60 {
		n := fmt.Sprintf("v%d", rnd.IntN(4))
		var value strings.Builder
		for range rnd.IntN(30) {
			value.WriteByte(" ab#=\\\"'$\n"[rnd.IntN(10)])
		}
		want[n] = value.String()
		if i%2 == 0 {
			out, err := exec.Command(tool, name, "set", n+"="+want[n]).CombinedOutput()
			require.NoError(t, err, "%s", out)
		} else {
			e, err := d.load(t.Context())
			require.NoError(t, err)
			require.NoError(t, e.Set(n, want[n]))
			b, err := e.Bytes()
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(name, b, 0o600))
		}
		e, err := d.load(t.Context())
		require.NoError(t, err)
		list, err := exec.Command(tool, name, "list").Output()
		require.NoError(t, err)
		for n, w := range want {
			got, ok := e.Get(n)
			require.True(t, ok)
			require.Equal(t, w, got)
			require.Contains(t, "\n"+string(list), "\n"+n+"="+w+"\n")
		}
	}
	require.NoError(t, d.Write(t.Context(), driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}))
	list, err := exec.Command(tool, name, "list").Output()
	require.NoError(t, err)
	for _, l := range []string{"ORDER=B A", "B_OK=1", "B_TRY=0", "A_OK=1", "A_TRY=0"} {
		require.Contains(t, "\n"+string(list), "\n"+l+"\n")
	}
}

func TestFirstSector(t *testing.T) {
	d := loader(t)
	chip := memflash.NewChip(d.Flashes...)
	s, err := fsys.NewSim(chip.Flashes(), true)
	require.NoError(t, err)
	e := NewBlock()
	require.NoError(t, e.Set("ORDER", "A"))
	require.NoError(t, e.Set("zz", strings.Repeat("z", 480)))
	b, err := e.Bytes()
	require.NoError(t, err)
	require.NoError(t, s.WriteFile("/grubenv", b))
	g, err := New(&Config{Path: "/grubenv", Names: []string{"A", "B"}, files: s})
	require.NoError(t, err)
	require.ErrorIs(t, g.Write(t.Context(), driver.Choice{Active: 1, Revert: ota.NoSlot}), ErrFull)
	got, err := s.ReadFile("/grubenv")
	require.NoError(t, err)
	require.Equal(t, b, got)
}

// TestInPlace: the file stays the one that GRUB knows, on the blocks that it knows.
func TestInPlace(t *testing.T) {
	name := filepath.Join(t.TempDir(), "grubenv")
	require.NoError(t, os.WriteFile(name, block(t), 0o600))
	before, err := os.Stat(name)
	require.NoError(t, err)
	d, err := New(&Config{Path: filepath.ToSlash(name), Names: []string{"A", "B"}})
	require.NoError(t, err)
	want := driver.Choice{Active: 1, Trial: true, Revert: 0, Tries: 1}
	require.NoError(t, d.Write(t.Context(), want))
	after, err := os.Stat(name)
	require.NoError(t, err)
	require.True(t, os.SameFile(before, after))
	require.Equal(t, int64(BlockSize), after.Size())
	got, err := d.Read(t.Context())
	require.NoError(t, err)
	require.Equal(t, want, got)
	require.NoError(t, os.Truncate(name, 40))
	require.Error(t, d.Write(t.Context(), driver.Choice{Active: 1, Revert: ota.NoSlot}))
}

func FuzzBlock(f *testing.F) {
	f.Add(block(f))
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := ParseBlock(b)
		if err != nil {
			require.ErrorIs(t, err, ErrFormat)
			return
		}
		again, err := e.Bytes()
		if err != nil {
			require.ErrorIs(t, err, ErrFull)
			return
		}
		f, err := ParseBlock(again)
		require.NoError(t, err)
		require.Equal(t, e.lines, f.lines)
	})
}
