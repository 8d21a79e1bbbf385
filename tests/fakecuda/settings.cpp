#include "settings.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

long from_environment(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value ? strtol(value, nullptr, 0) : otherwise;
}

int open_log() {
  const char* asked = getenv("FAKECUDA_LOG");
  if (!asked) return -1;
  std::string path = asked;
  size_t at = path.find("%d");
  if (at != std::string::npos) path.replace(at, 2, std::to_string(getpid()));
  return open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
}

std::string formatted(const char* format, va_list arguments) {
  char text[1000];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

// One write, so that lines of several threads or processes do not mix.
void append(const std::string& line) {
  static const int file = open_log();
  if (file < 0) return;
  std::string text = line + "\n";
  if (write(file, text.data(), text.size()) < 0) perror("fakecuda: FAKECUDA_LOG");
}

}  // namespace

const Settings& settings() {
  static const Settings found = {
      std::min(static_cast<int>(from_environment("FAKECUDA_DEVICES", 1)), kMaxDevices),
      static_cast<size_t>(from_environment("FAKECUDA_MEMORY_MB", 16384)) << 20,
      static_cast<int>(from_environment("FAKECUDA_CAPABILITY", 80)),
      static_cast<size_t>(from_environment("FAKECUDA_CONV_WORKSPACE_MB", 0)) << 20,
      static_cast<int>(from_environment("FAKECUDA_FILL", 0)) & 0xff,
  };
  return found;
}

void log_line(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  append(formatted(format, arguments));
  va_end(arguments);
}

void report_error(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = formatted(format, arguments);
  va_end(arguments);
  append("ERROR " + text);
  fprintf(stderr, "fakecuda: %s\n", text.c_str());
}
