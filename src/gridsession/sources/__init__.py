"""Where settings come from: arguments, a framework's settings, the environment, TOML, web.config.

Nothing here knows which options there are; `gridsession.settings` does.
"""
