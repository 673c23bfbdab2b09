// Package vm checks the packages for devices of Linux against the kernel itself: in a
// virtual machine with simulated NOR and NAND (mtdram, nandsim), UBI and the software
// watchdog. Folder guest holds what runs in it as /init. Everything is emulated.
package vm

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// modules are loaded in this order, each with these parameters.
var modules = [][2]string{
	{"mtdram", "total_size=1024 erase_size=64"},
	// 128 MiB of pages of 2048 bytes in blocks of 128 KiB; blocks 3, 7 and 20 are bad, 12
	// can be erased twice, 30 three times.
	{"nandsim", "first_id_byte=0x20 second_id_byte=0xa1 third_id_byte=0x00 fourth_id_byte=0x15 parts=64,64,32 badblocks=3,7,20 weakblocks=12:2,30:3 overridesize=0"},
	{"ubi", ""},
	{"softdog", ""},
}

func missing(t *testing.T, what, remedy string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("needs %s: %s", what, remedy)
	}
	t.Skipf("needs %s: %s", what, remedy)
}

// kernel returns the kernel that interop/qemu/setup unpacks.
func kernel(t *testing.T) (image string, mods map[string]string) {
	dir := os.Getenv("OTA_QEMU")
	if dir == "" {
		cache, err := os.UserCacheDir()
		require.NoError(t, err)
		dir = filepath.Join(cache, "ota-qemu")
	}
	dir = filepath.Join(dir, "amd64-generic")
	images, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	if err != nil || len(images) == 0 {
		missing(t, "a kernel", "interop/qemu/setup vm unpacks it to "+dir)
	}
	mods = map[string]string{}
	require.NoError(t, filepath.WalkDir(filepath.Join(dir, "lib", "modules"), func(path string, _ fs.DirEntry, err error) error {
		if name, ok := strings.CutSuffix(filepath.Base(path), ".ko"); ok {
			mods[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	}))
	return images[0], mods
}

// load returns the paths of a module and of what it depends on, in order.
func load(t *testing.T, mods map[string]string, name string) (paths []string) {
	path, ok := mods[strings.ReplaceAll(name, "-", "_")]
	if !ok {
		return nil // part of the kernel
	}
	f, err := elf.Open(path)
	require.NoError(t, err)
	defer f.Close()
	info, err := f.Section(".modinfo").Data()
	require.NoError(t, err)
	for entry := range strings.SplitSeq(string(info), "\x00") {
		if deps, ok := strings.CutPrefix(entry, "depends="); ok && deps != "" {
			for _, dep := range strings.Split(deps, ",") {
				paths = append(paths, load(t, mods, dep)...)
			}
		}
	}
	return append(paths, path)
}

// archive is an initramfs in cpio's format "newc".
type archive struct {
	bytes.Buffer
	n int
}

func (a *archive) add(name string, mode, major, minor int, data []byte) {
	a.n++
	fmt.Fprintf(a, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.n, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name)+1, 0, name)
	a.pad()
	a.Write(data)
	a.pad()
}

func (a *archive) pad() { a.Write(make([]byte, -a.Len()&3)) }

func TestKernel(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a virtual machine: not with -short")
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		missing(t, "qemu-system-x86_64", "install the package qemu-system-x86")
	}
	image, mods := kernel(t)
	dir := t.TempDir()
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, "init"), "./guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	program, err := os.ReadFile(filepath.Join(dir, "init"))
	require.NoError(t, err)

	var a archive
	for _, d := range []string{"dev", "proc", "sys", "modules"} {
		a.add(d, 0o040755, 0, 0, nil)
	}
	a.add("dev/console", 0o020600, 5, 1, nil)
	a.add("init", 0o100755, 0, 0, program)
	var list strings.Builder
	var seen []string
	for _, m := range modules {
		for _, path := range load(t, mods, m[0]) {
			if slices.Contains(seen, path) {
				continue
			}
			seen = append(seen, path)
			ko, err := os.ReadFile(path)
			require.NoError(t, err)
			name := filepath.Base(path)
			a.add("modules/"+name, 0o100644, 0, 0, ko)
			params := ""
			if strings.TrimSuffix(name, ".ko") == m[0] {
				params = m[1]
			}
			fmt.Fprintf(&list, "%s %s\n", name, params)
		}
	}
	require.Len(t, regexp.MustCompile(`(?m)^(mtdram|nandsim|ubi|softdog)\.ko `).FindAllString(list.String(), -1), 4, "modules of the kernel")
	a.add("modules/list", 0o100644, 0, 0, []byte(list.String()))
	a.add("TRAILER!!!", 0, 0, 0, nil)
	initrd := filepath.Join(dir, "initrd")
	require.NoError(t, os.WriteFile(initrd, a.Bytes(), 0o600))

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	vm := exec.CommandContext(ctx, qemu, "-M", "pc", "-accel", "tcg", "-cpu", "qemu64", "-m", "512", "-nodefaults", "-no-user-config",
		"-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", image, "-initrd", initrd, "-append", "console=ttyS0 panic=-1 loglevel=4 no_timer_check")
	vm.WaitDelay = 10 * time.Second
	var log bytes.Buffer
	vm.Stdout, vm.Stderr = &log, io.Discard
	err = vm.Run()
	text := strings.ReplaceAll(log.String(), "\r", "")
	require.NoError(t, err, text)
	for _, name := range []string{"mtdram", "nand", "ubi", "environment", "watchdog"} {
		t.Run(name, func(t *testing.T) {
			for line := range strings.Lines(text) {
				if rest, ok := strings.CutPrefix(line, "VM-LOG "+name+": "); ok {
					t.Log(strings.TrimSpace(rest))
				}
			}
			require.Contains(t, text, "VM-OK "+name+"\n", text)
		})
	}
	// Then it hangs, and only the watchdog can have ended that.
	require.Contains(t, text, "VM-HANG\n")
	require.NotContains(t, text, "VM-SURVIVED")
}
