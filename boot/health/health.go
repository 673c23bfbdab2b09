// Package health reports what would stop a rollback on a Linux machine.
//
// A boot loader goes back from a firmware that does not work when the machine is
// reset: it counts boots, and nothing else. What is not reset stays as it is, for
// ever: a kernel that halts after a panic, a process that hangs while no watchdog
// runs.
package health

import (
	"bufio"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/driver"
)

// The values of ota.Finding.ID.
const (
	PanicHalts        = "panic-halts"        // the kernel halts after a panic
	PanicEarly        = "panic-early"        // it does so until user space has changed that
	OopsContinues     = "oops-continues"     // the kernel goes on after an oops
	WatchdogMissing   = "watchdog-missing"   // there is none
	WatchdogIdle      = "watchdog-idle"      // there is one, but nobody has started it
	WatchdogSoftware  = "watchdog-software"  // the only one is a timer of the kernel itself
	WatchdogUnknown   = "watchdog-unknown"   // there is one, the kernel does not say whether it runs
	WatchdogNoWayOut  = "watchdog-nowayout"  // once started, it cannot be stopped
	WatchdogSlow      = "watchdog-slow"      // it takes many minutes
	WatchdogBit       = "watchdog-reset"     // it has caused the last boot
	EnvironmentSingle = "environment-single" // one copy of the loader's environment
	RootUnknown       = "root-unknown"       // nobody says which slot runs
	RootUnstable      = "root-unstable"      // the root device is named by its order of discovery
	LoaderPanic       = "loader-panic"       // the loader does not come back after a panic
	LoaderHang        = "loader-hang"        // nor after a hang before user space
	LoaderUnloadable  = "loader-unloadable"  // nor if the kernel cannot be loaded
	Unreadable        = "unreadable"         // what is to be known cannot be read
)

// Options say what is known already. The zero value is safe.
type Options struct {
	// Root is where proc, sys and dev are; "" means "/".
	Root string
	// Bootloader is what the program uses: it is asked which slot runs and, if it
	// is a [driver.Capable], for Capabilities. Without it the command line of the
	// kernel must say which slot runs.
	Bootloader ota.Bootloader
	// Capabilities are those of the boot loader, if they are known and Bootloader
	// does not tell.
	Capabilities driver.Capabilities
	// WatchdogInTrial says that a watchdog is started for each trial:
	// ota.Options.Watchdog.
	WatchdogInTrial bool
}

// slow is the timeout from which on a watchdog is called slow, in seconds.
const slow = 10 * 60

// Check looks at the machine. It reads a few files of proc and sys, which takes
// well under a millisecond, changes nothing, and does not open a watchdog, because that would start it.
// What cannot be read is a finding, too. o may be nil.
func Check(ctx context.Context, o *Options) []ota.Finding {
	if o == nil {
		o = &Options{}
	}
	c := checker{o: o, root: o.Root, can: o.Capabilities}
	if b, ok := o.Bootloader.(driver.Capable); ok {
		c.can = b.Capabilities()
	}
	if c.root == "" {
		c.root = "/"
	}
	c.panics()
	c.watchdogs()
	c.environment()
	c.running(ctx)
	c.loader()
	return c.found
}

type checker struct {
	o     *Options
	root  string
	can   driver.Capabilities
	found []ota.Finding
}

func (c *checker) add(id string, s ota.Severity, what, remedy string) {
	c.found = append(c.found, ota.Finding{ID: id, Severity: s, What: what, Remedy: remedy})
}

func (c *checker) path(name string) string { return filepath.Join(c.root, filepath.FromSlash(name)) }

// maxFile bounds what is read of a file.
const maxFile = 64 << 10

func (c *checker) read(name string) (string, error) {
	f, err := os.Open(c.path(name))
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile))
	return strings.TrimSpace(string(b)), err
}

// unreadable reports that a fact is missing.
func (c *checker) unreadable(name string, err error) {
	c.add(Unreadable, ota.Warning, fmt.Sprintf("/%s cannot be read: %v.", name, short(err)), "Mount proc and sys, and run as root.")
}

// short leaves out of err the path, which is that of a fixture in tests.
func short(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

const panicFile = "proc/sys/kernel/panic"

// panics checks that the kernel restarts the machine after a panic: panic= on the
// command line, kernel.panic later on; 0 waits for ever, a negative number
// restarts at once (torvalds/linux, Documentation/admin-guide/kernel-parameters.txt).
func (c *checker) panics() {
	s, err := c.read(panicFile)
	now, nerr := strconv.Atoi(s)
	if err = errors.Join(err, nerr); err != nil {
		c.unreadable(panicFile, err)
		return
	}
	const remedy = "Add panic=10 to the kernel's command line, for every slot."
	value, perr := driver.CmdlineParam(c.path("proc/cmdline"), "panic")
	given := 0
	if perr == nil {
		given, perr = strconv.Atoi(value)
	}
	switch {
	case now == 0:
		c.add(PanicHalts, ota.Critical, "After a panic the kernel halts for ever (kernel.panic is 0), and the boot loader gets no chance to go back.", remedy)
	case (perr != nil || given == 0) && !c.panicConfigured():
		c.add(PanicEarly, ota.Critical, fmt.Sprintf("kernel.panic is %d by now, but there is no panic= on the command line: a kernel that panics before that is set, because it finds no root file system for example, halts for ever.", now), remedy)
	}
	if s, err := c.read("proc/sys/kernel/panic_on_oops"); err == nil && s == "0" {
		c.add(OopsContinues, ota.Note, "After an oops the kernel goes on, perhaps with locks that nobody releases.", "Add oops=panic to the kernel's command line, or rely on a watchdog.")
	}
}

// panicConfigured reports whether the kernel was built to restart after a panic.
func (c *checker) panicConfigured() bool {
	f, err := os.Open(c.path("proc/config.gz"))
	if err != nil {
		return false
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return false
	}
	lines := bufio.NewScanner(io.LimitReader(z, 4<<20))
	for lines.Scan() {
		if v, ok := strings.CutPrefix(lines.Text(), "CONFIG_PANIC_TIMEOUT="); ok {
			n, err := strconv.Atoi(v)
			return err == nil && n != 0
		}
	}
	return false
}

// watchdogs checks that a watchdog would end a hang. The files are those of
// torvalds/linux, Documentation/ABI/testing/sysfs-class-watchdog.
func (c *checker) watchdogs() {
	const class = "sys/class/watchdog"
	names, err := filepath.Glob(filepath.Join(c.path(class), "watchdog*"))
	if err == nil && len(names) == 0 {
		if _, err := os.Stat(c.path("dev/watchdog")); err == nil {
			c.add(WatchdogUnknown, ota.Warning, "There is a /dev/watchdog, but the kernel does not tell about it.", "Build the kernel with CONFIG_WATCHDOG_SYSFS.")
			return
		}
		c.add(WatchdogMissing, ota.Critical, "There is no watchdog: a firmware that hangs stays until somebody cuts the power.",
			"Enable the driver of the hardware's watchdog in the kernel; softdog is better than nothing.")
		return
	}
	armed, hardware, known := false, false, false
	for _, path := range names {
		name := filepath.Base(path)
		get := func(file string) string {
			s, err := c.read(class + "/" + name + "/" + file)
			if err != nil {
				return ""
			}
			return s
		}
		soft := get("identity") == "Software Watchdog"
		hardware = hardware || !soft
		state := get("state")
		known = known || state != ""
		armed = armed || state == "active"
		label := name
		if id := get("identity"); id != "" {
			label += " (" + ota.Quote(id) + ")"
		}
		// WDIOF_CARDRESET; include/uapi/linux/watchdog.h.
		if n, err := strconv.ParseUint(get("bootstatus"), 0, 32); err == nil && n&0x20 != 0 {
			c.add(WatchdogBit, ota.Note, "The last boot was caused by "+label+".", "")
		}
		if n, err := strconv.ParseUint(get("timeout"), 10, 32); err == nil && n > slow && state == "active" {
			c.add(WatchdogSlow, ota.Warning, fmt.Sprintf("%s waits for %d seconds.", label, n), "Give it a timeout below that of the commit.")
		}
		if get("nowayout") == "1" && c.o.WatchdogInTrial {
			c.add(WatchdogNoWayOut, ota.Warning, label+" cannot be stopped after a trial: the machine is reset unless somebody goes on feeding it.",
				"Let another program feed it after the commit, or load the driver with nowayout=0.")
		}
	}
	switch {
	case !known:
		c.add(WatchdogUnknown, ota.Warning, "The kernel does not say whether a watchdog runs.", "Build it with CONFIG_WATCHDOG_SYSFS.")
	case armed:
	case c.o.WatchdogInTrial:
		c.add(WatchdogIdle, ota.Warning, "No watchdog runs now. One will be started for a trial, by this program: a hang before that is not noticed.",
			"Let the boot loader start it, and open it early: systemd.watchdog_sec=30 on the command line, RuntimeWatchdogSec= in system.conf.")
	default:
		c.add(WatchdogIdle, ota.Critical, "There is a watchdog, but nobody has started it: a firmware that hangs stays until somebody cuts the power.",
			"Set ota.Options.Watchdog, or RuntimeWatchdogSec= in systemd's system.conf.")
	}
	if !hardware {
		c.add(WatchdogSoftware, ota.Warning, "The only watchdog is a timer of the kernel itself, which does not help if the kernel hangs.",
			"Enable the driver of the hardware's watchdog in the kernel.")
	}
}

func (c *checker) environment() {
	if c.can.Copies == 1 {
		c.add(EnvironmentSingle, ota.Warning, cmp.Or(c.can.Loader, "The boot loader")+" keeps one copy of its environment: a power cut while it is written loses all of it.",
			"Build the loader with a redundant environment, if it can have one (U-Boot: CONFIG_ENV_REDUNDANT, once CONFIG_SYS_REDUNDAND_ENVIRONMENT), and name both copies in fw_env.config.")
	}
}

// running checks that the running slot can be known for certain.
func (c *checker) running(ctx context.Context) {
	const remedy = "Let the boot script add a parameter to the kernel's command line: ota.slot=, rauc.slot=, or root=PARTUUID=."
	if c.o.Bootloader != nil {
		if _, err := c.o.Bootloader.Running(ctx); err != nil {
			c.add(RootUnknown, ota.Critical, fmt.Sprintf("It cannot be found out which slot runs: %v.", err), remedy)
		}
		return
	}
	const name = "proc/cmdline"
	for _, key := range []string{"ota.slot", "rauc.slot", "bootchooser.active", "androidboot.slot_suffix"} {
		if _, err := driver.CmdlineParam(c.path(name), key); err == nil {
			return
		}
	}
	root, err := driver.CmdlineParam(c.path(name), "root")
	switch {
	case err == nil && !unstable(root):
	case err == nil:
		c.add(RootUnstable, ota.Warning, "The root file system is "+ota.Quote(root)+": the kernel gives such names in the order in which it finds devices.",
			"Use root=PARTUUID= or root=PARTLABEL=.")
	case errors.Is(err, ota.ErrUnknownSlot):
		c.add(RootUnknown, ota.Critical, "The kernel's command line does not say which slot runs.", remedy)
	default:
		c.unreadable(name, err)
	}
}

// unstable reports whether the named device may be another one at the next boot.
// Numbers of eMMC and MTD come from the hardware or the device tree.
func unstable(root string) bool {
	return strings.HasPrefix(root, "/dev/sd") || strings.HasPrefix(root, "/dev/nvme") || strings.HasPrefix(root, "/dev/vd")
}

func (c *checker) loader() {
	p := c.can
	if p.Loader == "" {
		return
	}
	for _, x := range []struct {
		answer   driver.Answer
		id, when string
	}{
		{p.OnPanic, LoaderPanic, "after a panic of the kernel"},
		{p.OnHang, LoaderHang, "after a hang before user space"},
		{p.OnUnloadable, LoaderUnloadable, "when the kernel cannot be loaded"},
	} {
		switch x.answer {
		case driver.No:
			c.add(x.id, ota.Critical, p.Loader+" does not go back "+x.when+": somebody must cut the power.", "")
		case driver.Watchdog:
			c.add(x.id, ota.Warning, p.Loader+" goes back "+x.when+" only if a hardware watchdog resets the machine.",
				"Let the boot loader start the hardware watchdog, if it can, and set watchdog.open_timeout= on the kernel's command line.")
		}
	}
}

// Worst returns the highest severity among fs, "" if there are none.
func Worst(fs []ota.Finding) ota.Severity {
	worst := ota.Severity("")
	rank := map[ota.Severity]int{ota.Note: 1, ota.Warning: 2, ota.Critical: 3}
	for _, f := range fs {
		if rank[f.Severity] > rank[worst] {
			worst = f.Severity
		}
	}
	return worst
}
