//go:build linux

package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// server is ota serve, in a process of its own.
type server struct {
	cmd  *exec.Cmd
	root string
	addr string

	mu  sync.Mutex
	got int64 // bytes of the files that were sent whole
}

// serve serves everything in b.dir.
func (b *bench) serve() (*server, error) {
	exe := filepath.Join(b.dir, "ota")
	if _, err := os.Stat(exe); err != nil {
		if err := build(exe, "./cmd/ota"); err != nil {
			return nil, err
		}
	}
	s := &server{root: b.dir, cmd: exec.Command(exe, "serve", "-listen", "127.0.0.1:0", b.dir)}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	log, err := s.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		s.stop()
		return nil, fmt.Errorf("ota serve: %w", err)
	}
	s.addr = strings.TrimSpace(line)
	go func() { // ends with the process
		for lines := bufio.NewScanner(log); lines.Scan(); {
			s.count(lines.Text())
		}
	}()
	return s, nil
}

// count adds what a line of the log tells of. Long names are cut there, behind what
// makes them different.
func (s *server) count(line string) {
	f := strings.Fields(line)
	for i, w := range f {
		if w == "GET" && i+2 < len(f) && f[i+2] == "200" {
			names, _ := filepath.Glob(filepath.Join(s.root, strings.Trim(f[i+1], `":.…`)) + "*")
			if len(names) == 0 {
				continue
			}
			if st, err := os.Stat(names[0]); err == nil {
				s.mu.Lock()
				s.got += st.Size()
				s.mu.Unlock()
			}
		}
	}
}

// asked returns how many bytes of whole files were sent since it was last called.
func (s *server) asked() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.got
	s.got = 0
	return n
}

func (s *server) url(path string) string {
	rel, err := filepath.Rel(s.root, path)
	if err != nil {
		return path
	}
	return s.addr + "/" + filepath.ToSlash(rel)
}

func (s *server) stop() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

// peers returns those that are installed, ready to install the new image in this
// kind of package: "none" or "zstd". Each is a script, see peers/.
func (b *bench) peers(kind string) (rs []*rival, err error) {
	want := map[string]float64{"none": 0.4, "zstd": 0.6}[kind]
	scripts, err := filepath.Glob("bench/peers/*.sh")
	if err != nil {
		return nil, err
	}
	for _, script := range scripts {
		name := strings.TrimSuffix(filepath.Base(script), ".sh")
		if !b.only.MatchString(name) {
			continue
		}
		dir := filepath.Join(b.dir, name+"-"+kind)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		call := func(verb string) (string, error) {
			cmd := exec.Command("bash", script, verb, kind)
			cmd.Env = append(os.Environ(), "LC_ALL=C", "IMAGE="+b.new, "SLOT="+b.slots[1], "OTHER="+b.slots[0], "DIR="+dir)
			out, err := cmd.CombinedOutput()
			return strings.TrimSpace(string(out)), err
		}
		version, err := call("prepare")
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.ExitCode() == 77 {
			fmt.Printf("without %s: %s\n", name, version)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w: %s", script, err, version)
		}
		rs = append(rs, &rival{name: version, want: want, run: func() error {
			out, err := call("install")
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			return err
		}})
	}
	return rs, nil
}
