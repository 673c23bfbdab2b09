//go:build linux

package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/slotota/ota/bundle"
)

// used is what a program has taken.
type used struct{ took, cpu, rss float64 } // seconds, and MiB

// usage runs a program. Its memory is not known without GNU time: what the kernel
// tells of a child begins with what this program has.
func usage(name string, args ...string) (u used, err error) {
	timer, err := exec.LookPath("time")
	if err == nil {
		name, args = timer, append([]string{"-q", "-f", "%M", name}, args...)
	}
	var text bytes.Buffer
	before := cpu()
	u.took, err = timed(func() error {
		cmd := exec.Command(name, args...)
		cmd.Stderr = &text
		return cmd.Run()
	})
	u.cpu = cpu() - before
	if err != nil {
		return u, fmt.Errorf("%s: %w: %s", name, err, text.String())
	}
	if timer != "" {
		lines := strings.Split(strings.TrimSpace(text.String()), "\n")
		kib, err := strconv.ParseFloat(lines[len(lines)-1], 64)
		if err != nil {
			return u, err
		}
		u.rss = kib / 1024
	}
	return u, nil
}

// pick returns a figure of each.
func pick(us []used, what func(used) float64) (s series) {
	for _, u := range us {
		s = append(s, what(u))
	}
	return s
}

func tookOf(u used) float64 { return u.took }
func cpuOf(u used) float64  { return u.cpu }
func rssOf(u used) float64  { return u.rss }

// create: ota create beside zstd at the same level, with as many threads, and ota
// verify beside sha256sum of the same file. What is compared is processor time, which
// other programs disturb less; times are in the comments.
func create(b *bench) (rs []row, err error) {
	tool := filepath.Join(b.dir, "ota")
	if err := build(tool, "./cmd/ota"); err != nil {
		return nil, err
	}
	fw, z := filepath.Join(b.dir, "created.zip"), filepath.Join(b.dir, "created.zst")
	stored := filepath.Join(b.dir, "created-stored.zip")
	defer func() {
		for _, name := range []string{fw, z, stored} {
			os.Remove(name)
		}
	}()
	level := b.pack.Level
	if level == 0 {
		level = bundle.DefaultLevel
	}
	args := []string{"create", "-platform", "p", "-version", "1", "-part", "rootfs=" + b.new, "-o"}
	packed := append(args, fw, "-compress", "zstd", "-level", strconv.Itoa(level))
	if b.pack.Frame != 0 {
		packed = append(packed, "-frame", strconv.FormatInt(b.pack.Frame, 10))
	}
	if _, err := usage(tool, append(args[:len(args):len(args)], stored)...); err != nil {
		return nil, err
	}
	var ours, theirs, verify, sum []used
	threads := runtime.NumCPU()
	for range b.rounds {
		for _, m := range []struct {
			to   *[]used
			name string
			args []string
		}{
			{&theirs, "zstd", []string{"-q", "-f", "-" + strconv.Itoa(level), "-T" + strconv.Itoa(threads), b.new, "-o", z}},
			{&ours, tool, packed},
			{&sum, "sha256sum", []string{stored}},
			{&verify, tool, []string{"verify", "-allow-unsigned", stored}},
		} {
			u, err := usage(m.name, m.args...)
			if err != nil {
				return nil, err
			}
			*m.to = append(*m.to, u)
		}
	}
	size := func(name string) float64 {
		if st, err := os.Stat(name); err == nil {
			return float64(st.Size()) / float64(b.size) * 100
		}
		return 0
	}
	return []row{
		{what: fmt.Sprintf("create, zstd level %d, %d MiB: CPU", level, b.size>>20), ours: pick(ours, cpuOf).median(), unit: "s",
			than: fmt.Sprintf("zstd -%d -T%d", level, threads), bound: pick(theirs, cpuOf).median(), want: 1.25,
			comments: []string{
				fmt.Sprintf("ours   %s, %.1f %% of the image", pick(ours, tookOf), size(fw)),
				fmt.Sprintf("theirs %s, %.1f %% of the image, in frames that are not independent, without digests", pick(theirs, tookOf), size(z)),
			}},
		{what: "  peak RSS", ours: pick(ours, rssOf).median(), unit: "MiB", than: "figure to keep", bound: 128, want: 1},
		{what: "verify, stored: CPU", ours: pick(verify, cpuOf).median(), unit: "s", than: "sha256sum", bound: pick(sum, cpuOf).median(), want: 1.11,
			comments: []string{fmt.Sprintf("ours %s, theirs %s", pick(verify, tookOf), pick(sum, tookOf))}},
	}, nil
}
