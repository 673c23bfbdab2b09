package qemu_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota/interop/qemu"
)

var (
	quick     = flag.Bool("qemu", false, "boot U-Boot on arm64: about a minute")
	long      = flag.Bool("qemu.long", false, "boot all loaders, and cut the power")
	bootLimit = flag.Duration("qemu.boot", 10*time.Minute, "limit for one boot, or one command")
)

// needs skips a test that was not asked for, or lacks a tool; in CI it fails
// instead. It maps programs to Debian packages.
func needs(t *testing.T, isLong bool, tools map[string]string) {
	t.Helper()
	switch {
	case isLong && !*long:
		t.Skip("boots many emulated machines: run scripts/qemu full, or go test with -qemu.long")
	case !*quick && !*long:
		t.Skip("boots emulated machines: run scripts/qemu, or go test with -qemu")
	}
	for tool, pkg := range tools {
		_, err := exec.LookPath(tool)
		if filepath.IsAbs(tool) {
			_, err = os.Stat(tool)
		}
		if err != nil {
			missing(t, tool, "apt-get install "+pkg)
		}
	}
	t.Parallel() // as many machines as there are processors
}

// missing skips the test, or in CI fails it.
func missing(t *testing.T, what, remedy string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is missing: %s", what, remedy)
	}
	t.Skipf("%s is missing: %s (interop/qemu/setup does it)", what, remedy)
}

// run runs a tool and returns its output.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%v: %s", cmd, out)
	return string(out)
}

// machine is one QEMU process; the guest's serial port is its standard input and
// output.
type machine struct {
	t    *testing.T
	cmd  *exec.Cmd
	in   io.Writer
	from time.Time // of the test, for reports
	done chan struct{}

	mu    sync.Mutex
	lines []string
	more  chan struct{} // has an element after each line
	next  int

	stage time.Time // begin of what the test watches
}

// power starts a machine. Its console is appended to a file among the test's
// artifacts (go test -artifacts keeps them).
func power(t *testing.T, bin string, args ...string) *machine {
	t.Helper()
	m := &machine{t: t, from: time.Now(), done: make(chan struct{}), more: make(chan struct{}, 1)}
	m.cmd = exec.Command(bin, append([]string{
		"-accel", "tcg", "-smp", "1", "-display", "none", "-nodefaults", "-no-user-config", "-serial", "stdio",
		"-netdev", "user,id=net,ipv6=off",
	}, args...)...)
	in, err := m.cmd.StdinPipe()
	require.NoError(t, err)
	m.in = in
	out, err := m.cmd.StdoutPipe()
	require.NoError(t, err)
	log, err := os.OpenFile(filepath.Join(t.ArtifactDir(), "console.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	require.NoError(t, err)
	m.cmd.Stderr = log
	require.NoError(t, m.cmd.Start())
	go func() {
		defer close(m.done)
		defer log.Close()
		r := bufio.NewReader(out)
		for {
			s, err := r.ReadString('\n')
			if s = strings.TrimRight(s, "\r\n"); s != "" {
				fmt.Fprintf(log, "%8.3f %s\n", time.Since(m.from).Seconds(), s)
				m.mu.Lock()
				m.lines = append(m.lines, s)
				m.mu.Unlock()
				select {
				case m.more <- struct{}{}:
				default:
				}
			}
			if err != nil {
				break
			}
		}
		m.cmd.Wait() // killed, mostly
	}()
	t.Cleanup(m.cut)
	return m
}

// cut ends the machine as a power cut does. It may be called again.
func (m *machine) cut() {
	m.cmd.Process.Kill()
	<-m.done
}

// after waits while the machine goes on.
func (m *machine) after(d time.Duration) {
	select {
	case <-m.done:
	case <-time.After(d):
	}
}

// send types a command.
func (m *machine) send(format string, args ...any) {
	fmt.Fprintf(m.in, format+"\n", args...)
}

var errEnded = errors.New("the machine ended")

// await returns the next line that one of patterns matches, and which. A failure
// that the guest reports ends the test unless a pattern matches it.
func (m *machine) await(limit time.Duration, patterns ...string) (which int, match []string) {
	m.t.Helper()
	which, match, err := m.seek(limit, patterns...)
	if err != nil {
		m.mu.Lock()
		tail := slices.Clone(m.lines[max(0, len(m.lines)-40):])
		m.mu.Unlock()
		m.t.Fatalf("waiting for %q: %v\n\t%s", patterns, err, strings.Join(tail, "\n\t"))
	}
	return which, match
}

// within returns how long to wait at most: a test that go test -timeout ends would
// leave the machine behind.
func (m *machine) within(limit time.Duration) time.Duration {
	if end, ok := m.t.Deadline(); ok {
		limit = min(limit, max(time.Until(end)-30*time.Second, 0))
	}
	return limit
}

func (m *machine) seek(limit time.Duration, patterns ...string) (which int, match []string, err error) {
	var res []*regexp.Regexp
	for _, p := range patterns {
		res = append(res, regexp.MustCompile(p))
	}
	limit = m.within(limit)
	timer := time.NewTimer(limit)
	defer timer.Stop()
	ended := false
	for {
		m.mu.Lock()
		lines := m.lines[m.next:]
		m.mu.Unlock()
		for _, line := range lines {
			m.next++
			for i, re := range res {
				if match := re.FindStringSubmatch(line); match != nil {
					return i, match, nil
				}
			}
			if strings.HasPrefix(line, qemu.Prefix+qemu.Fail) {
				return 0, nil, errors.New(line)
			}
		}
		switch {
		case len(lines) > 0:
			continue
		case ended:
			return 0, nil, errEnded
		}
		select {
		case <-m.more:
		case <-m.done:
			ended = true // the last lines are still to be looked at
		case <-timer.C:
			return 0, nil, fmt.Errorf("nothing within %v", limit)
		}
	}
}

const (
	readyLine = "^" + qemu.Prefix + qemu.Ready + " .*"
	panicLine = "Kernel panic"
)

// ready waits until the guest is up, in slot number slot.
func (m *machine) ready(slot int, version string) qemu.Report {
	m.t.Helper()
	_, match := m.await(*bootLimit, readyLine)
	r := m.parse(match[0])
	m.log("slot %d runs %s, up %ss", r.Running, r.Version, r.Uptime)
	require.Equal(m.t, slot, r.Running, "slot that runs")
	require.Equal(m.t, version, r.Version)
	require.Empty(m.t, r.Problem)
	return r
}

func (m *machine) parse(line string) qemu.Report {
	m.t.Helper()
	r, err := qemu.ParseReport(line)
	require.NoError(m.t, err, line)
	return r
}

// do has the guest carry out a command.
func (m *machine) do(format string, args ...any) qemu.Report {
	m.t.Helper()
	m.send(format, args...)
	_, match := m.await(*bootLimit, "^"+qemu.Prefix+qemu.Done+" .*")
	return m.parse(match[0])
}

// tool has the guest run a program and returns what it writes.
func (m *machine) tool(args ...string) (out string) {
	m.t.Helper()
	m.send("tool %s", strings.Join(args, " "))
	for {
		which, match := m.await(*bootLimit, "^"+qemu.Prefix+qemu.Done, "^"+qemu.Prefix+qemu.Output+" (.*)")
		if which == 0 {
			return out
		}
		out += match[1] + "\n"
	}
}

// holds requires that the running slot holds img, bit by bit.
func (m *machine) holds(img *image) {
	m.t.Helper()
	command := "digests"
	want := map[string]string{}
	for name, b := range img.parts {
		command += fmt.Sprintf(" %s=%d", name, len(b))
		sum := sha256.Sum256(b)
		want[name] = hex.EncodeToString(sum[:])
	}
	require.Equal(m.t, want, m.do("%s", command).Digests)
}

// off shuts the machine down.
func (m *machine) off() {
	m.t.Helper()
	m.send("poweroff")
	select {
	case <-m.done:
	case <-time.After(m.within(*bootLimit)):
		m.t.Fatal("the machine does not turn itself off")
	}
}

// log reports a step, with the time since the machine was started.
func (m *machine) log(format string, args ...any) {
	m.t.Helper()
	m.t.Logf("%6.1fs  %s", time.Since(m.from).Seconds(), fmt.Sprintf(format, args...))
}
